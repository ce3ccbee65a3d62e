"""Configuration of the joined model: the two bases' own configurations and what the projector between them needs."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, configuration_utils

from qwhisper.frames import DEFAULT_LEAD_SILENCE_S, DEFAULT_TAIL_SILENCE_S, FrameArithmetic

DEFAULT_KINDS = {"audio_config": "whisper", "text_config": "qwen3"}  # of values without `model_type`


@strict
class Qwen3AudioConfig(PreTrainedConfig):
    """Whisper encoder + AudioProjection + causal LM.

    audio_config: a Whisper configuration (its encoder part is used). text_config: any causal LM's.
    audio_token_id: the placeholder's id; it may lie outside the LM's vocabulary, since it is never looked up.
    projector_stack: encoder frames (20 ms each) joined into one token. projector_hidden_act: activation between its
    layers.
    projector_dropout: share of the projector's input that is dropped in training.
    projector_scale: factor on the projector's output. projector_init_scale: factor on its Xavier initialisation.
    audio_lead_silence, audio_tail_silence: seconds of silence around every window's speech, see docs/silence.md for the
    measurement.
    audio_base, text_base: {"name", "fingerprint"} of the bases whose weights are not saved with this model; None when
    they are.
    audio_tower_trained: the encoder is no longer its base's, so its weights are saved with the projector's.
    tie_word_embeddings: taken from text_config.
    """

    model_type = "qwen3_audio"
    # The cache, which is no logits of Trainer's metrics: transformers 5.24 changed its name.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    if hasattr(configuration_utils, "SubConfigSpec"):  # from transformers 5.18 on; then defaults are not saved
        sub_configs_defaults: ClassVar[dict[str, Any]] = {
            name: configuration_utils.SubConfigSpec(config_class=AutoConfig, model_type=kind)
            for name, kind in DEFAULT_KINDS.items()
        }
    else:
        sub_configs: ClassVar[dict[str, Any]] = dict.fromkeys(DEFAULT_KINDS, AutoConfig)

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    audio_token_id: int = 151669
    projector_stack: int = 4
    projector_hidden_act: str = "gelu"
    projector_dropout: float = 0.0
    projector_scale: float = 1.0
    projector_init_scale: float = 0.1
    audio_lead_silence: float = DEFAULT_LEAD_SILENCE_S
    audio_tail_silence: float = DEFAULT_TAIL_SILENCE_S
    audio_base: dict | None = None
    text_base: dict | None = None
    audio_tower_trained: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        for name, kind in DEFAULT_KINDS.items():
            setattr(self, name, _configuration(getattr(self, name), kind))
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    @property
    def frames(self) -> FrameArithmetic:
        """The length arithmetic that data and model share."""
        return FrameArithmetic(
            stack=self.projector_stack,
            max_encoder_frames=self.audio_config.max_source_positions,
            lead_silence_s=self.audio_lead_silence,
            tail_silence_s=self.audio_tail_silence,
        )


def _configuration(given: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    """A base's configuration. given: it, or its values; `default` is the model type of values without one."""
    if isinstance(given, PreTrainedConfig):
        return given
    return AutoConfig.for_model(**{"model_type": default, **(given or {})})
