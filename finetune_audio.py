"""Fine-tune Whisper encoder + projector + Qwen3 for spoken dialogue: the same as `qwhisper train`.

python finetune_audio.py --train_file data.jsonl --output_dir run
"""

import sys

from qwhisper.cli import entry_point

if __name__ == "__main__":
    entry_point(["train", *sys.argv[1:]])
