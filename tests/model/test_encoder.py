import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import WhisperForConditionalGeneration

from qwhisper.errors import UsageError
from qwhisper.frames import encoder_frames
from qwhisper.model import attention
from qwhisper.model.attention import PACKED_ATTENTION
from qwhisper.model.audio_layout import encoder_layout
from qwhisper.model.bases import load_encoder
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from tests.small import large_weights, whisper_config


def small_encoder() -> TrueLengthWhisperEncoder:
    torch.manual_seed(0)
    encoder = TrueLengthWhisperEncoder._from_config(whisper_config(), attn_implementation=PACKED_ATTENTION)
    large_weights(encoder)
    return encoder.eval()


def whisper_layers(encoder: TrueLengthWhisperEncoder, mel: torch.Tensor) -> torch.Tensor:
    """Whisper's own computation on one window [frames, bins] of any length."""
    hidden_states = nn.functional.gelu(encoder.conv2(nn.functional.gelu(encoder.conv1(mel.T[None]))))
    hidden_states = hidden_states.transpose(1, 2) + encoder.embed_positions.weight[: hidden_states.shape[-1]]
    for layer in encoder.layers:
        hidden_states = layer(hidden_states, None)
    return encoder.layer_norm(hidden_states)[0]


@torch.no_grad()
@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_packed_windows_equal_each_window_alone(lengths):
    encoder = small_encoder()
    mel = torch.randn(sum(lengths), 80)
    packed = encoder(mel, encoder_layout(lengths)).last_hidden_state.split([encoder_frames(n) for n in lengths])
    for piece, window in zip(packed, mel.split(lengths), strict=True):
        torch.testing.assert_close(piece, whisper_layers(encoder, window), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_nan_window_leaves_its_neighbours_finite():
    encoder, lengths = small_encoder(), [11, 8, 13]
    mel = torch.randn(sum(lengths), 80)
    healthy = encoder(mel, encoder_layout(lengths)).last_hidden_state
    mel[11:19] = float("nan")
    before, bad, after = encoder(mel, encoder_layout(lengths)).last_hidden_state.split([6, 4, 7])
    assert bad.isnan().all()
    torch.testing.assert_close(before, healthy[:6])
    torch.testing.assert_close(after, healthy[10:])


@torch.no_grad()
def test_a_kernel_that_reads_heads_where_they_lie_gives_the_same_without_copies(monkeypatch):
    def segments(query, key, value, *args, **keywords):
        assert keywords["segment_blocks"].tolist() == [[0, 0, 6], [6, 6, 10], [10, 10, 17]]
        seen.append([x[0].transpose(0, 1).is_contiguous() for x in (query, key, value)])
        return attention.PACKED_KERNELS["sdpa_per_segment"](query, key, value, *args, **keywords)

    encoder, seen, mel = small_encoder(), [], torch.randn(32, 80)
    layout = encoder_layout([11, 8, 13])
    expected = encoder(mel, layout).last_hidden_state
    monkeypatch.setattr(attention, "segments_can_run", lambda query, dropout: query.shape[-1] == 8)
    monkeypatch.setitem(attention.PACKED_KERNELS, "segments", segments)
    torch.testing.assert_close(encoder(mel, layout).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert seen == [[True, True, True]] * len(encoder.layers)
    encoder.set_attn_implementation("eager")
    encoder(mel, layout)
    assert len(seen) == len(encoder.layers)


def test_a_window_longer_than_the_encoder_is_refused():
    with pytest.raises(ValueError, match="1501 encoder frames is longer than the encoder's 1500"):
        small_encoder()(torch.zeros(3001, 80), encoder_layout([3001]))


def test_it_is_differentiable_when_it_is_trained():
    encoder = small_encoder()
    encoder(torch.randn(30, 80), encoder_layout([11, 19])).last_hidden_state.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.dim() > 1 and name != "embed_positions.weight":
            assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_3000_frames_of_real_whisper_equal_transformers_bit_for_bit(shared):
    folder = shared / "models" / "whisper-tiny.en"
    encoder = load_encoder(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    assert sum(p.numel() for p in encoder.parameters()) == 8_208_384
    assert not any("decoder" in name for name, _ in encoder.named_parameters())
    whole = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for name, parameter in whole.model.encoder.named_parameters():
        assert torch.equal(encoder.get_parameter(name), parameter), name
    mel = torch.randn(3000, 80)
    expected = whole.model.encoder(mel.T[None]).last_hidden_state[0]
    assert torch.equal(encoder(mel, encoder_layout([3000])).last_hidden_state, expected)


def test_an_encoder_saved_alone_loads_in_the_dtype_asked_for(shared):
    folder = shared / "models" / "whisper-base-encoder"
    encoder = load_encoder(str(folder), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert encoder.conv1.weight.abs().mean() > 0.01
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_a_missing_weight_is_an_error(tmp_path):
    encoder = small_encoder()
    state = {k: v for k, v in encoder.state_dict().items() if k != "layers.1.fc1.weight"}
    encoder.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UsageError, match=r"1 weights are missing or of another shape, the first: layers.1.fc1.weight"):
        load_encoder(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
