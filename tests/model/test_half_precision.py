import pytest
import torch

from qwhisper.model.attention import PACKED_ATTENTION
from qwhisper.model.audio_layout import encoder_layout
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.half_precision import BOUND, OverflowClamp
from tests.small import large_weights, whisper_config


def encoder(dtype: torch.dtype) -> TrueLengthWhisperEncoder:
    torch.manual_seed(0)
    model = TrueLengthWhisperEncoder._from_config(whisper_config(), attn_implementation=PACKED_ATTENTION)
    large_weights(model)
    return model.to(dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("part", ["conv2", "layers.0.self_attn.out_proj", "layers.0.fc1", "layers.1.fc2"])
def test_what_overflows_is_bounded_and_counted_by_module(part):
    model, mel = encoder(torch.float16), torch.randn(20, 80)
    weight = model.get_submodule(part).weight
    weight.copy_(6e4 * weight.sign())
    assert model(mel, encoder_layout([20])).last_hidden_state.isfinite().all()
    counts = model.overflow.take_counts()
    assert counts[part] > 0 and part == next(name for name, _ in model.named_modules() if name in counts)
    assert model.overflow.take_counts() == {}


@torch.no_grad()
def test_a_sound_encoder_is_left_as_it_is(monkeypatch):
    mel = torch.randn(20, 80)
    model = encoder(torch.float16)
    features = model(mel, encoder_layout([20])).last_hidden_state
    assert model.overflow.take_counts() == {}
    monkeypatch.setattr(OverflowClamp, "clamp_output", lambda self, name, module, args, output: None)
    assert torch.equal(features, encoder(torch.float16)(mel, encoder_layout([20])).last_hidden_state)


@torch.no_grad()
def test_other_dtypes_are_neither_bounded_nor_counted():
    model, mel = encoder(torch.float32), torch.randn(20, 80)
    model.layers[0].fc1.bias.fill_(2 * BOUND)
    kept = []
    model.layers[0].fc1.register_forward_hook(lambda module, args, output: kept.append(output))
    model(mel, encoder_layout([20]))
    assert kept[0].max() > BOUND and model.overflow.take_counts() == {}


@torch.no_grad()
def test_nan_is_not_hidden():
    model, mel = encoder(torch.float16), torch.randn(20, 80)
    mel[3] = float("nan")
    assert model(mel, encoder_layout([20])).last_hidden_state.isnan().any() and model.overflow.take_counts() == {}
