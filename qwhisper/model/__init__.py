"""The joined model. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioForConditionalGeneration, Qwen3AudioModel
from qwhisper.model.processing_qwen3_audio import Qwen3AudioProcessor

AutoConfig.register("qwen3_audio", Qwen3AudioConfig)
AutoModelForMultimodalLM.register(Qwen3AudioConfig, Qwen3AudioForConditionalGeneration)
AutoProcessor.register(Qwen3AudioConfig, Qwen3AudioProcessor)

__all__ = ["Qwen3AudioConfig", "Qwen3AudioForConditionalGeneration", "Qwen3AudioModel", "Qwen3AudioProcessor"]
