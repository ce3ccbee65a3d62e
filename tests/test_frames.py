import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwhisper.frames import FrameArithmetic, encoder_frames, mel_frames

ARITHMETICS = st.builds(
    FrameArithmetic,
    stack=st.integers(1, 8),
    max_encoder_frames=st.sampled_from([250, 750, 1500]),
    lead_silence_s=st.sampled_from([0.0, 0.25, 0.333]),
    tail_silence_s=st.sampled_from([0.0, 1.0, 2.0001]),
)


@given(frames=ARITHMETICS, num_samples=st.integers(0, 3_000_000))
def test_windows_cover_the_clip_and_fit_the_encoder(frames, num_samples):
    lengths = frames.window_lengths(num_samples)
    speech = [length - frames.silence_samples for length in lengths]
    assert sum(speech) == max(400, num_samples)
    assert all(0 < n <= frames.max_speech_samples for n in speech)
    assert all(n % frames.samples_per_token == 0 for n in speech[:-1])
    assert all(encoder_frames(mel_frames(length)) <= frames.max_encoder_frames for length in lengths)


@given(frames=ARITHMETICS, num_samples=st.integers(0, 3_000_000))
def test_a_clip_has_the_tokens_of_its_windows_each_counted_alone(frames, num_samples):
    lengths = frames.window_lengths(num_samples)
    assert frames.num_tokens(num_samples) == sum(frames.window_tokens(length) for length in lengths)


def test_windows_of_a_clip_are_of_nearly_equal_length():
    assert [n / 16_000 for n in FrameArithmetic().window_lengths(31 * 16_000)] == [15.52, 15.48]
    assert FrameArithmetic().window_lengths(30 * 16_000) == [480_000]


def test_every_window_has_silence_and_the_silence_costs_no_more_than_three_tokens():
    frames = FrameArithmetic(lead_silence_s=0.5, tail_silence_s=2.0)
    assert frames.window_lengths(16_000) == [56_000]
    assert FrameArithmetic().num_tokens(16_000) == 13
    assert frames.num_tokens(16_000) == 13 + 3  # 50 frames of speech and 12 behind it
    assert frames.window_lengths(30 * 16_000) == [240_640 + 40_000, 239_360 + 40_000]


@given(tail=st.floats(0.24, 5.0), lead=st.floats(0.0, 5.0), num_samples=st.integers(1, 300_000))
def test_how_much_silence_there_is_does_not_change_the_tokens(tail, lead, num_samples):
    frames = FrameArithmetic(lead_silence_s=lead, tail_silence_s=tail)
    assert frames.num_tokens(num_samples) == FrameArithmetic(tail_silence_s=0.24).num_tokens(num_samples)


def test_a_window_that_is_no_longer_than_its_silence_is_refused():
    with pytest.raises(ValueError, match="no longer than its silence"):
        FrameArithmetic(lead_silence_s=0.5).kept_frames(25)


def test_a_twentieth_of_a_second_has_three_encoder_frames_and_one_token():
    assert (mel_frames(800), encoder_frames(mel_frames(800)), FrameArithmetic().num_tokens(800)) == (5, 3, 1)
    assert FrameArithmetic().num_tokens(1) == 1


@given(frames=st.integers(1, 3000))
def test_encoder_frames_are_what_the_convolution_gives(frames):
    convolution = torch.nn.Conv1d(1, 1, kernel_size=3, stride=2, padding=1, device="meta")
    assert convolution(torch.empty(1, 1, frames, device="meta")).shape[-1] == encoder_frames(frames)


@pytest.mark.parametrize(
    "values", [{"stack": 0}, {"stack": 9, "max_encoder_frames": 8}, {"tail_silence_s": -0.1}, {"tail_silence_s": 29.99}]
)
def test_impossible_lengths_are_refused(values):
    with pytest.raises(ValueError, match=r"stack|silence"):
        FrameArithmetic(**values)
