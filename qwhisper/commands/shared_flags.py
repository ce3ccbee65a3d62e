"""Help texts, types and limits that flags of several verbs share. Imports nothing heavy."""

from typing import Literal

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Hub = Literal["huggingface", "modelscope"]
CHECKPOINT_HELP = "Folder of a checkpoint, or of a run (its best checkpoint, or else its newest)."
AUDIO_MODEL_HELP = (
    "Current location of the Whisper used in training: hub id or folder (default: its location then, or a folder of "
    "the same name near the checkpoint)."
)
TEXT_MODEL_HELP = "Current location of the language model used in training, with the same default."
DATA_ROOT_HELP = (
    "Folder that absolute audio paths must lie in (default: the file's own folder). Nothing outside it is read."
)
HUB_HELP = "Where models are downloaded from."
DEVICE_HELP = "cpu, cuda, cuda:1 and so on (default: the first GPU if there is one)."
DTYPE_HELP = "Number format of the two base models (auto: bf16 on a GPU, fp32 on a CPU)."
MOST_NEW_TOKENS = 2**20  # more than any language model has positions for
