"""Small joined models of several LM families, and samples for them."""

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    WhisperConfig,
)

from qwhisper.data.rows import Sample
from qwhisper.data.windows import clip_windows
from qwhisper.model.attention import PACKED_ATTENTION
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.loading import join
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration

VOCABULARY = 96
SPECIAL = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
SHAPE = SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SLIDING_WINDOW = 7


def text_config(family: str) -> PreTrainedConfig:
    if family == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        return GPT2Config(**SPECIAL, **no_dropout, **shape)
    if family == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        return Gemma3TextConfig(**SHAPE, sliding_window=SLIDING_WINDOW, layer_types=layers, query_pre_attn_scalar=8)
    return {"qwen3": Qwen3Config, "llama": LlamaConfig}[family](**SHAPE)


def whisper_config() -> WhisperConfig:
    encoder = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 80}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "decoder_start_token_id": 1}
    return WhisperConfig(d_model=16, vocab_size=50, **SPECIAL, **encoder, **decoder)


def large_weights(module: nn.Module) -> None:
    """Draws matrices at a tenth instead of 0.02, so that attention and audio change the outputs visibly."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)


def small_model(
    family: str = "qwen3", *, audio_token_id: int = VOCABULARY - 1, **config_values
) -> Qwen3AudioForConditionalGeneration:
    """A joined model in fp32; its LM's weights are large enough that audio and attention matter."""
    encoder = TrueLengthWhisperEncoder._from_config(
        whisper_config(), attn_implementation=PACKED_ATTENTION
    ).requires_grad_(False)
    language_model = AutoModelForCausalLM.from_config(text_config(family), attn_implementation=PACKED_ATTENTION)
    large_weights(language_model)
    language_model.requires_grad_(False)
    config = Qwen3AudioConfig(
        audio_config=encoder.config,
        text_config=language_model.config,
        audio_token_id=audio_token_id,
        projector_init_scale=1.0,
        audio_lead_silence=0.0,
        audio_tail_silence=0.0,
        **config_values,
    )
    return join(Qwen3AudioForConditionalGeneration, config, encoder.eval(), language_model)


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def make_sample(model, text_lengths: list[int], clip_samples: list[int] = (), *, seed: int = 0) -> Sample:
    """Text of the given lengths with a clip between each two of them; the last text is supervised."""
    generator = np.random.default_rng(seed)
    clips = [clip_windows(noise(n, seed + i), model.config.frames) for i, n in enumerate(clip_samples)]
    ids: list[int] = []
    for i, length in enumerate(text_lengths):
        ids += generator.integers(3, VOCABULARY - 2, size=length).tolist()
        if i < len(clips):
            ids += [model.config.audio_token_id] * model.config.frames.num_tokens(clip_samples[i])
    ids = np.array(ids, dtype=np.int64)
    labels = np.full_like(ids, -100)
    labels[-text_lengths[-1] :] = ids[-text_lengths[-1] :]
    labels[0] = -100
    return Sample(f"s{seed}", "test", ids, labels, [window for clip in clips for window in clip])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
