import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwhisper.frames import FrameArithmetic, encoder_frames, mel_frames

ARITHMETICS = st.builds(
    FrameArithmetic,
    stack=st.integers(1, 8),
    max_encoder_frames=st.sampled_from([50, 750, 1500]),
    lead_silence_s=st.sampled_from([0.0, 0.25, 0.333]),
    tail_silence_s=st.sampled_from([0.0, 1.0, 2.0001]),
)


@given(frames=ARITHMETICS, num_samples=st.integers(0, 3_000_000))
def test_windows_cover_the_clip_and_fit_the_encoder(frames, num_samples):
    lengths = frames.window_lengths(num_samples)
    assert sum(lengths) == max(400, frames.lead_samples + num_samples + frames.tail_samples)
    assert all(0 < length <= frames.max_window_samples for length in lengths)
    assert all(length % frames.samples_per_token == 0 for length in lengths[:-1])
    assert all(encoder_frames(mel_frames(length)) <= frames.max_encoder_frames for length in lengths)


@given(frames=ARITHMETICS, num_samples=st.integers(0, 3_000_000))
def test_a_clip_has_the_tokens_of_its_windows_each_counted_alone(frames, num_samples):
    lengths = frames.window_lengths(num_samples)
    assert frames.num_tokens(num_samples) == sum(frames.window_tokens(length) for length in lengths)
    assert [frames.window_tokens(n) for n in lengths[:-1]] == [n // frames.samples_per_token for n in lengths[:-1]]


def test_windows_of_a_clip_are_of_nearly_equal_length():
    assert [n / 16_000 for n in FrameArithmetic().window_lengths(31 * 16_000)] == [15.52, 15.48]
    assert FrameArithmetic().window_lengths(30 * 16_000) == [480_000]


def test_silence_is_part_of_the_clip():
    frames = FrameArithmetic(lead_silence_s=0.25, tail_silence_s=1.0)
    assert frames.window_lengths(16_000) == [36_000]
    assert frames.num_tokens(16_000) == FrameArithmetic().num_tokens(36_000) == 29


def test_a_twentieth_of_a_second_has_three_encoder_frames_and_one_token():
    assert (mel_frames(800), encoder_frames(mel_frames(800)), FrameArithmetic().num_tokens(800)) == (5, 3, 1)
    assert FrameArithmetic().num_tokens(1) == 1


@given(frames=st.integers(1, 3000))
def test_encoder_frames_are_what_the_convolution_gives(frames):
    convolution = torch.nn.Conv1d(1, 1, kernel_size=3, stride=2, padding=1, device="meta")
    assert convolution(torch.empty(1, 1, frames, device="meta")).shape[-1] == encoder_frames(frames)


@pytest.mark.parametrize("values", [{"stack": 0}, {"stack": 9, "max_encoder_frames": 8}, {"tail_silence_s": -0.1}])
def test_impossible_lengths_are_refused(values):
    with pytest.raises(ValueError, match=r"stack|silence"):
        FrameArithmetic(**values)
