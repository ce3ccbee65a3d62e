"""Fine-tune Whisper encoder + projector + Qwen3 for spoken dialogue: the same as `qwhisper train`.

python finetune_audio.py --train_file data.jsonl --output_dir run
"""

import sys

from qwhisper.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
