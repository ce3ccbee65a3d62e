"""Sizes from configurations: compared with transformers' own models, made without memory."""

import pytest
import torch
from transformers import GPT2Config, MixtralConfig, Qwen3Config, Qwen3ForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from qwhisper.engine.plan_sizes import AUDIO_SIZES, TEXT_SIZES, audio_size, built_in, text_size


@pytest.mark.parametrize("name", TEXT_SIZES)
def test_parameters_of_each_qwen3_are_those_of_transformers_model(name):
    size = TEXT_SIZES[name]
    config = Qwen3Config(
        vocab_size=size.vocabulary, hidden_size=size.hidden, num_hidden_layers=size.layers,
        intermediate_size=size.intermediate, num_attention_heads=size.heads, num_key_value_heads=size.key_heads,
        head_dim=size.head_dim, tie_word_embeddings=size.tied,
    )  # fmt: skip
    assert text_size(config) == size
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == size.parameters
    linears = {
        n.rsplit(".", 1)[-1]: m for n, m in model.model.layers[0].named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert {n: (m.in_features, m.out_features) for n, m in linears.items()} == size.linears


@pytest.mark.parametrize("name", ["whisper-tiny", "whisper-large-v3-turbo"])
def test_parameters_of_a_whisper_encoder_are_those_of_transformers_model(name):
    size = AUDIO_SIZES[name]
    config = WhisperConfig(
        d_model=size.width,
        encoder_layers=size.layers,
        encoder_attention_heads=4,
        encoder_ffn_dim=size.feed_forward,
        num_mel_bins=size.mel_bins,
    )
    assert audio_size(config) == size
    with torch.device("meta"):
        assert sum(p.numel() for p in WhisperEncoder(config).parameters()) == size.parameters


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("Qwen/Qwen3-0.6B-Base", "qwen3-0.6b"),
        ("Qwen/Qwen3-4B-Instruct-2507/", "qwen3-4b"),
        ("Qwen/Qwen3-30B-A3B", None),
        ("Qwen/Qwen3-8", None),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", None),
        ("Qwen/Qwen3-8B-FP8", None),
        ("Qwen/Qwen3-8B-AWQ", None),
        ("openai/whisper-large-v3-turbo", "whisper-large-v3-turbo"),
        ("openai/whisper-tiny.en", "whisper-tiny"),
    ],
)
def test_a_hub_id_is_found_by_the_longest_name_that_fits(name, found):
    sizes = TEXT_SIZES | AUDIO_SIZES
    assert built_in(name, sizes) == (sizes[found] if found else None)


def test_other_architectures_are_planned_by_their_shapes_but_a_mixture_of_experts_is_refused():
    size = text_size(GPT2Config(n_embd=32, n_layer=2, n_head=4))
    assert (size.hidden, size.layers, size.heads, size.intermediate, size.norms_heads) == (32, 2, 4, 128, False)
    with pytest.raises(ValueError, match="mixture of experts"):
        text_size(MixtralConfig())
