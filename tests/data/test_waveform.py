import io

import numpy as np
import pytest
import soundfile
import torch

from qwhisper.data.audio import load_audio
from qwhisper.data.waveform import Sound, data_url, is_base64, sound_of_array, sound_of_base64, sound_of_bytes
from qwhisper.errors import BadClipError
from tests.audio_parts import RATE, chirp, parts_of, write_chirp


def heard(samples, rate=16_000) -> np.ndarray:
    return load_audio(sound_of_array(samples, rate, "here").data)


@pytest.mark.parametrize(
    ("samples", "scale"),
    [
        (np.array([-(2**15), -100, 100, 2**15 - 1], np.int16), 2**15),
        (np.array([-(2**31), -(2**20), 2**20, 2**31 - 128], np.int32), 2**31),
        (np.array([0.5, -2.0, 1e-3, 0.0], np.float32), 1),
        (np.array([-100, 100, 2**15 - 1], ">i2"), 2**15),
        (np.array([0.5, -2.0, 1e-3, 0.0], np.float64), 1),
        (np.array([0.5, -2.0, 1e-3, 0.0], ">f4"), 1),
        (np.array([0.5, -2.0, 0.25, 0.0], np.float16), 1),
        (torch.tensor([0.5, -2.0, 0.25, 0.0], dtype=torch.bfloat16), 1),
        ([0.5, -2, 0.25, 0], 1),
    ],
)
def test_samples_have_the_scale_of_their_type(samples, scale):
    expected = np.asarray(samples.float() if torch.is_tensor(samples) else samples, dtype=np.float64) / scale
    np.testing.assert_array_equal(heard(samples), expected.astype(np.float32))


def test_bytes_are_unsigned_samples():
    np.testing.assert_array_equal(heard(np.array([0, 64, 128, 255], np.uint8)), np.array([-128, -64, 0, 127]) / 128)


@pytest.mark.parametrize(
    ("integers", "subtype", "scale", "middle"),
    [(np.int16, "PCM_16", 2**15, 0), (np.int32, "PCM_32", 2**31, 0), (np.uint8, "PCM_U8", 2**7, 128)],
)
def test_integers_sound_as_in_a_file_of_their_type(tmp_path, integers, subtype, scale, middle):
    samples = (chirp(0.3).astype(np.float64) * scale + middle).astype(integers)
    soundfile.write(tmp_path / "a.wav", (samples.astype(np.float64) - middle) / scale, RATE, subtype=subtype)
    np.testing.assert_array_equal(heard(samples, RATE), load_audio(tmp_path / "a.wav"))


def test_an_array_is_resampled_as_a_file_is(tmp_path):
    for rate in (RATE, 44_100, np.int64(22_050), 16_000.0, torch.tensor(11_025)):
        soundfile.write(tmp_path / "a.wav", chirp(0.5), int(rate), subtype="FLOAT")
        np.testing.assert_array_equal(heard(chirp(0.5), rate), load_audio(tmp_path / "a.wav"))


def test_the_smaller_of_two_dimensions_is_the_channels():
    left, right = chirp(0.2), chirp(0.2)[::-1] / 2
    expected = (left + right) / 2
    np.testing.assert_allclose(heard(np.stack([left, right])), expected, atol=1e-7)
    np.testing.assert_allclose(heard(np.stack([left, right], axis=1)), expected, atol=1e-7)
    np.testing.assert_array_equal(heard(left[None]), left)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros(100, bool), "samples of type bool"),
        (np.zeros(100, complex), "samples of type complex128"),
        (np.array([0.1, None]), "samples of type object"),
        (np.arange(100), "samples of type int64"),
        ([1, 2, 3], "samples of type int64"),
        (["a.wav"], "samples of type <U5"),
        (np.zeros((2, 50, 50)), r"has the shape \[2, 50, 50\]"),
        (np.zeros((50, 50)), r"has the shape \[50, 50\]"),
        (np.zeros((99, 100)), "has 99 channels"),
        ([[0.1, 0.2], [0.3]], "lists have different lengths"),
        ((chirp(0.1), "8000"), "lists have different lengths or types"),
        (torch.zeros(9, device="meta"), "is no array .NotImplementedError"),
        (torch.zeros(9).to_sparse(), "is no array .TypeError"),
        (np.frombuffer(b"RIFF" + bytes(900), np.uint8), "is an array of the bytes of a file"),
    ],
)
def test_an_array_that_is_no_sound_is_refused(samples, reason):
    with pytest.raises(ValueError, match=reason):
        sound_of_array(samples, 16_000, "here")


@pytest.mark.parametrize("rate", [0, -1, 999, 10**12, 16_000.5, float("nan"), "16000", True, None, [16_000]])
def test_a_rate_that_no_sound_has_is_refused(rate):
    with pytest.raises(ValueError, match="sampling rate"):
        sound_of_array(chirp(0.1), rate, "here")


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.where(np.arange(1600) == 5, np.nan, chirp(0.2)), "NaN or Inf"),
        (np.where(np.arange(1600) == 5, np.inf, chirp(0.2)), "NaN or Inf"),
        (np.full(1600, 1e300), "NaN or Inf"),
        (chirp(0.2) * 2**15, "samples up to"),
        (np.zeros(1600, np.float32), "silent"),
        (np.full(1600, 128, np.uint8), "silent"),
        ([], "empty"),
        (np.zeros((2, 0), bool), "empty"),
    ],
)
def test_sound_that_cannot_be_used_is_named_where_it_is_read(samples, reason):
    with pytest.raises(BadClipError, match=reason):
        heard(samples)


def test_equal_samples_are_equal_sounds_and_others_are_not():
    first, again = (sound_of_array(chirp(0.2), RATE, name) for name in ("one", "two"))
    assert first == again and hash(first) == hash(again)
    assert len({first, again, sound_of_array(chirp(0.2), 16_000, "one"), sound_of_array(-chirp(0.2), RATE, "one")}) == 3


def test_base64_is_read_in_both_alphabets_with_and_without_padding_and_line_breaks(tmp_path):
    part = parts_of(write_chirp(tmp_path / "a.wav", 0.1))["transformers: base64"]["base64"]
    data = (tmp_path / "a.wav").read_bytes()
    lines = "\n".join(part[i : i + 76] for i in range(0, len(part), 76)) + "\n"
    for text in (
        part,
        part.rstrip("="),
        part.translate(str.maketrans("+/", "-_")),
        lines,
        f"DATA:audio/x;base64,{part}",
    ):
        assert sound_of_base64(text, "here").data == data
    assert is_base64(part) and is_base64(lines)
    assert not is_base64(part[:20]) and not is_base64("x" * 10_000) and not is_base64("clips/" * 30)


@pytest.mark.parametrize(
    "text", ["UklGR!", "clip.wav", "data:audio/wav,abc", "data:audio/wav;base64", "data:;base64,", "é"]
)
def test_text_that_is_no_base64_is_refused(text):
    with pytest.raises(ValueError, match=r"base64|empty"):
        sound_of_base64(text, "here")


def test_bytes_in_any_container_are_taken_as_they_are():
    file = io.BytesIO()
    soundfile.write(file, chirp(0.2), RATE, format="FLAC")
    data = file.getvalue()
    sounds = [sound_of_bytes(value, "here") for value in (data, bytearray(data), memoryview(data))]
    assert {sound.data for sound in sounds} == {data}
    assert sound_of_base64(data_url(sounds[0]), "there") == sounds[0] == Sound(sounds[0].digest, "x", b"")
    with pytest.raises(ValueError, match="empty"):
        sound_of_bytes(b"", "here")
