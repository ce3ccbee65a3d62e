"""qwhisper teaches a text model to listen: Whisper encoder + AudioProjection + Qwen3, fine-tuned on one card.

Importing it imports neither torch nor transformers: each name below is imported on first use. From then on
transformers' Auto classes know the model.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qwhisper.auto_classes import READ_RUN, register_when_loaded

if TYPE_CHECKING:
    from qwhisper.data.collator import ConversationCollator
    from qwhisper.infer.assistant import Assistant
    from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
    from qwhisper.model.processor import Qwen3AudioProcessor
    from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration, Qwen3AudioModel
    from qwhisper.train.finetune import TrainResult, finetune
    from qwhisper.train.hf import LoRAStabilizeCallback, LossDebugCallback, NaNMonitorCallback, ProjectorFreezeHook

__version__ = "0.1.0"

__all__ = [
    "Assistant",
    "ConversationCollator",
    "LoRAStabilizeCallback",
    "LossDebugCallback",
    "NaNMonitorCallback",
    "ProjectorFreezeHook",
    "Qwen3AudioConfig",
    "Qwen3AudioForConditionalGeneration",
    "Qwen3AudioModel",
    "Qwen3AudioProcessor",
    "TrainResult",
    "finetune",
]

_MODULES = {
    "Assistant": "infer.assistant",
    "ConversationCollator": "data.collator",
    "LoRAStabilizeCallback": "train.hf",
    "LossDebugCallback": "train.hf",
    "NaNMonitorCallback": "train.hf",
    "ProjectorFreezeHook": "train.hf",
    "Qwen3AudioConfig": "model.configuration_qwen3_audio",
    "Qwen3AudioForConditionalGeneration": "model.qwen3_audio",
    "Qwen3AudioModel": "model.qwen3_audio",
    "Qwen3AudioProcessor": "model.processor",
    "TrainResult": "train.finetune",
    "finetune": "train.finetune",
}


def _load(name: str) -> Any:
    """The object that a name of `__all__` stands for, or the function that reads a run's folder."""
    if name == READ_RUN:
        return import_module(f"{__name__}.checkpoint.reading").read_run
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = _load(name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# On some CPUs bitsandbytes warns on import, whether 4-bit weights are used or not, that a faster kernel is missing.
# Here, because processes that a command spawns import nothing of the command line.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

register_when_loaded(_load)
