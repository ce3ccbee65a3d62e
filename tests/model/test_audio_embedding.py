"""Features of clips, one clip a row: alone, among others, and as a backend that batches by clip asks for them."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from qwhisper.data.windows import clip_windows
from qwhisper.frames import SAMPLE_RATE
from qwhisper.model.mel import packed_log_mel
from tests.model.parts import noise
from tests.small import large_weights, small_model

SECONDS = (28, 29.99, 30, 31, 60, 125)
MOST = 1500


def row(model, seconds: float, seed: int) -> tuple[Tensor, Tensor]:
    """(features [mel bins, frames], mask [frames]) of a clip: its windows with one empty frame between two."""
    windows = clip_windows(noise(int(seconds * SAMPLE_RATE), seed), model.config.frames)
    features, mask = [], []
    for window in windows:
        mel, _ = packed_log_mel(torch.from_numpy(window), [len(window)], 80)
        features += [mel.T, torch.zeros(80, 1)]
        mask += [torch.ones(len(mel), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)]
    return torch.cat(features[:-1], dim=1), torch.cat(mask[:-1])


def padded(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    longest = max(len(mask) for _, mask in rows)
    features = torch.stack([torch.nn.functional.pad(f, (0, longest - f.shape[1])) for f, _ in rows])
    mask = torch.stack([torch.nn.functional.pad(m, (0, longest - len(m))) for _, m in rows])
    return {"input_features": features, "input_features_mask": mask}


def make_model(max_source_positions: int):
    torch.manual_seed(0)
    model = small_model().eval()
    large_weights(model.model.audio_tower)
    model.config.audio_lead_silence, model.config.audio_tail_silence = 0.1, 0.3
    model.config.audio_config.max_source_positions = max_source_positions
    model.model.audio_tower.max_source_positions = max_source_positions
    return model


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("scale", [0.05, pytest.param(1.0, marks=pytest.mark.slow)], ids=["small", "real"])
def test_clips_of_any_length_alone_and_mixed_give_the_same_features(scale, implementation):
    """At a scale of 0.05 the encoder's 30 s are 1.5 s, and so are the clips."""
    model = make_model(int(MOST * scale))
    model.config.audio_lead_silence, model.config.audio_tail_silence = 0.1 * scale, 0.3 * scale
    model.set_attn_implementation(implementation)
    rows = [row(model, seconds * scale, seed) for seed, seconds in enumerate(SECONDS)]
    frames = model.config.frames
    counts = [frames.num_tokens(int(seconds * scale * SAMPLE_RATE)) for seconds in SECONDS]
    windows = [len(frames.window_lengths(int(seconds * scale * SAMPLE_RATE))) for seconds in SECONDS]
    assert windows[0] == 1 and windows[-1] > 4
    alone = [model.get_audio_features(**padded([one])).pooler_output for one in rows]
    assert [len(tokens) for tokens in alone] == counts
    mixed = model.get_audio_features(**padded(rows), return_dict=True)
    assert mixed.pooler_output.shape == (sum(counts), 32)
    torch.testing.assert_close(mixed.pooler_output, torch.cat(alone), atol=1e-5, rtol=1e-4)


def backend(model, rows: list[tuple[Tensor, Tensor]], counts: list[int]) -> list[Tensor]:
    """The contract of a backend that keeps the fields of each clip as one item: items of one length are stacked, others
    stay a list whose entries are encoded one at a time; the embeddings are then cut by the placeholders of each clip.
    """
    features, masks = [f for f, _ in rows], [m for _, m in rows]
    if len({f.shape for f in features}) == 1:
        mask = torch.stack(masks)
        embeddings = model.get_audio_features(torch.stack(features), return_dict=True, input_features_mask=mask)[1]
        assert embeddings.ndim == 2 and len(embeddings) == sum(counts)
        return list(embeddings.split(counts))
    items = []
    for feature, mask, count in zip(features, masks, counts, strict=True):
        found = model.get_audio_features(feature.unsqueeze(0), return_dict=True, input_features_mask=mask.unsqueeze(0))
        assert found.pooler_output.shape[0] == count
        items.append(found.pooler_output)
    return items


@torch.no_grad()
@pytest.mark.parametrize("seconds", [(1.4, 1.4, 1.4), (3.0, 1.5, 6.2), (1.55,)], ids=str)
def test_a_backend_that_batches_by_clip_gets_the_embeddings_of_each_clip(seconds):
    model = make_model(75)
    counts = [model.config.frames.num_tokens(int(s * SAMPLE_RATE)) for s in seconds]
    rows = [row(model, s, seed) for seed, s in enumerate(seconds)]
    found = backend(model, rows, counts)
    for seed, (s, tokens) in enumerate(zip(seconds, found, strict=True)):
        windows = clip_windows(noise(int(s * SAMPLE_RATE), seed), model.config.frames)
        expected = model.get_audio_features(
            audio_waveforms=torch.from_numpy(np.concatenate(windows)),
            audio_lengths=torch.tensor([len(window) for window in windows]),
        ).pooler_output
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)


def test_a_window_that_the_encoder_cannot_take_is_named():
    model = make_model(75)
    features = torch.zeros(1, 80, 151)
    with pytest.raises(ValueError, match=r"151 mel frames is longer than the 150 .*each row is one window"):
        model.get_audio_features(features)
    with pytest.raises(ValueError, match=r"151 mel frames is longer than the 150 .*has no 0 where one window"):
        model.get_audio_features(features, torch.ones(1, 151))
    with pytest.raises(ValueError, match="a row of input_features_mask has no 1"):
        model.get_audio_features(features.expand(2, -1, -1), torch.tensor([[1] * 50 + [0] * 101, [0] * 151]))


@torch.no_grad()
def test_hidden_states_and_attentions_of_the_encoder():
    model = make_model(75)
    clips = padded([row(model, 1.0, 0), row(model, 2.4, 1)])
    packed = model.get_audio_features(**clips, output_hidden_states=True)
    assert len(packed.hidden_states) == 3 and packed.attentions is None
    model.set_attn_implementation("eager")
    found = model.get_audio_features(**clips, output_attentions=True, output_hidden_states=True)
    windows, longest = 4, found.hidden_states[0].shape[1]
    assert found.attentions[0].shape == (windows, 2, longest, longest)
    torch.testing.assert_close(found.attentions[1].sum(-1), torch.ones(windows, 2, longest))
    torch.testing.assert_close(found.pooler_output, packed.pooler_output, atol=1e-5, rtol=1e-4)
    values = model.get_audio_features(**clips, return_dict=False)
    assert isinstance(values, tuple) and torch.equal(values[1], found.pooler_output)
