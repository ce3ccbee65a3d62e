"""qwhisper teaches a text model to listen: Whisper encoder + AudioProjection + Qwen3, fine-tuned on one card."""

import logging

__version__ = "0.1.0"

# On some CPUs bitsandbytes warns on import, whether 4-bit weights are used or not, that a faster kernel is missing.
# Here, because processes that a command spawns import nothing of the command line.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
