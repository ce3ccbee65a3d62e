"""The joined model. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioModel
from qwhisper.model.processor import Qwen3AudioProcessor
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration, build_from_bases

AutoConfig.register("qwen3_audio", Qwen3AudioConfig)
AutoModelForMultimodalLM.register(Qwen3AudioConfig, Qwen3AudioForConditionalGeneration)
AutoProcessor.register(Qwen3AudioConfig, Qwen3AudioProcessor)

__all__ = [
    "Qwen3AudioConfig",
    "Qwen3AudioForConditionalGeneration",
    "Qwen3AudioModel",
    "Qwen3AudioProcessor",
    "build_from_bases",
]
