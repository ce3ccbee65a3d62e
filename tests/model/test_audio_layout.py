"""Indices of the audio path give what each window alone gives, at exact and at larger sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwhisper.data.windows import clip_windows
from qwhisper.frames import HOP_LENGTH, N_FFT, FrameArithmetic, mel_frames
from qwhisper.model.audio_layout import (
    AudioSizes,
    audio_layout,
    audio_sizes,
    encoder_layout,
    on_device,
    padding_segments,
    waveform_row,
)
from qwhisper.model.segment_blocks import segment_blocks
from tests.model.parts import noise
from tests.small import small_model

SILENCE = {"audio_lead_silence": 0.1, "audio_tail_silence": 0.4}
ROOM = AudioSizes(windows=3, mel_frames=211, encoder_frames=120, max_window=40, tokens=13)


def row_of(windows: list[np.ndarray], sizes: AudioSizes) -> torch.Tensor:
    return waveform_row(windows, sizes)


def larger(sizes: AudioSizes) -> AudioSizes:
    return AudioSizes(**{name: value + getattr(ROOM, name) for name, value in vars(sizes).items()})


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=4), room=st.booleans())
def test_each_frame_of_a_window_is_a_frame_of_the_row_with_its_reflected_margin(lengths, room):
    windows = [noise(n, seed) for seed, n in enumerate(lengths)]
    sizes = audio_sizes(lengths, FrameArithmetic())
    sizes = larger(sizes) if room else sizes
    layout = audio_layout(lengths, FrameArithmetic(), sizes)
    frames = row_of(windows, sizes).unfold(0, N_FFT, HOP_LENGTH)[layout.mel.frames]
    for number, window in enumerate(windows):
        padded = np.pad(np.pad(window, (0, max(0, N_FFT - len(window)))), N_FFT // 2, mode="reflect")
        expected = torch.from_numpy(padded).unfold(0, N_FFT, HOP_LENGTH)[: mel_frames(len(window))]
        assert torch.equal(frames[layout.mel.windows == number], expected)
    padding = frames[layout.mel.windows == sizes.windows]
    assert len(padding) == (ROOM.mel_frames if room else 0) and not padding.any()


@torch.no_grad()
@pytest.mark.parametrize("room", [False, True])
@pytest.mark.parametrize("silence", [{}, SILENCE])
def test_ready_indices_give_the_tokens_that_waveforms_and_lengths_give(silence, room):
    model = small_model()
    for name, value in silence.items():
        setattr(model.config, name, value)
    frames = model.config.frames
    windows = [window for n in (1, 800, 7_000, 16_001) for window in clip_windows(noise(n, n), frames)]
    lengths = [len(window) for window in windows]
    sizes = audio_sizes(lengths, frames)
    expected = model.get_audio_features(
        audio_waveforms=torch.from_numpy(np.concatenate(windows)), audio_lengths=torch.tensor(lengths)
    ).pooler_output
    assert len(expected) == sizes.tokens == sum(frames.window_tokens(n) for n in lengths)
    sizes = larger(sizes) if room else sizes
    layout = audio_layout(lengths, frames, sizes)
    found = model.model.projected(
        model.model.encoded_row(row_of(windows, sizes), layout.mel, layout.encoder), layout.groups
    )
    torch.testing.assert_close(found[: len(expected)], expected, atol=1e-5, rtol=1e-5)
    assert len(found) == sizes.tokens


def test_padding_stands_in_segments_of_its_own_and_unused_borders_repeat_the_end():
    layout = encoder_layout([5, 8], AudioSizes(windows=6, mel_frames=20, encoder_frames=14, max_window=4))
    assert layout.cu_seq_lens_host == (0, 3, 7, 11, 14, 14, 14)
    assert layout.cu_seq_lens.tolist() == list(layout.cu_seq_lens_host) and layout.max_length == 4
    assert (
        torch.equal(layout.segment_blocks, segment_blocks(layout.cu_seq_lens_host)) and len(layout.segment_blocks) == 6
    )
    assert layout.slots.unique().numel() == 14 and layout.positions.tolist()[7:] == [0, 1, 2, 3, 0, 1, 2]
    assert len(layout.mel) == 40 and (layout.mel == 20).sum() == 40 - 13  # no padded mel frame is read


@pytest.mark.parametrize(
    ("total", "segments", "longest"),
    [(6, 9, 9), (7, 1, 9), (7, 9, 3), (13, 3, 5)],
    ids=["rows", "segments", "longest", "room"],
)
def test_what_does_not_fit_is_refused(total, segments, longest):
    with pytest.raises(ValueError, match="do not fit into"):
        padding_segments([4, 3], total, segments, longest)
    assert padding_segments([4, 3], 12, 3, 5) == [5]


def test_everything_moves_to_a_device_together():
    sizes = audio_sizes([800, 5000], FrameArithmetic())
    moved = on_device(audio_layout([800, 5000], FrameArithmetic(), sizes), "meta")
    parts = [*vars(moved.mel).values(), *vars(moved.encoder).values(), moved.groups]
    assert {part.device.type for part in parts if isinstance(part, torch.Tensor)} == {"meta"}
    assert replace(sizes, windows=3).samples == sizes.samples + 2 * HOP_LENGTH
