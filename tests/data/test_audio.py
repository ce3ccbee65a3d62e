import errno
import os
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from qwhisper.data import audio, mono
from qwhisper.data.audio import LOUDEST_PEAK, load_audio
from qwhisper.data.clips import AudioClip, load_clip
from qwhisper.data.windows import clip_windows
from qwhisper.errors import BadClipError
from qwhisper.frames import FrameArithmetic

CUT_FORMATS = [(".wav", {}), (".wav", {"subtype": "IMA_ADPCM"}), (".aiff", {}), (".au", {}), (".mp3", {})]
RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000)


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_rate_and_channels_gives_the_same_tone(tmp_path, rate, channels):
    path = tmp_path / "tone.wav"
    soundfile.write(path, np.repeat(tone(1.0, rate)[:, None], channels, axis=1), rate, subtype="FLOAT")
    waveform = load_audio(path)
    assert waveform.dtype == np.float32
    assert abs(len(waveform) - 16_000) <= 1
    expected = tone(1.0, 16_000)[800:-800]
    np.testing.assert_allclose(waveform[800 : 800 + len(expected)], expected, atol=2e-3)


def test_channels_are_averaged(tmp_path):
    path = tmp_path / "stereo.wav"
    left, right = tone(0.1, 16_000), tone(0.1, 16_000, 1000.0)
    soundfile.write(path, np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path), (left + right) / 2, atol=1e-6)


def stereo(tmp_path, left: np.ndarray, right: np.ndarray, rate: int = 16_000):
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([left, right], axis=1), rate, subtype="FLOAT")
    return path


@pytest.mark.parametrize(
    ("left", "right", "heard"),
    [
        (1.0, -0.999, 0),  # silence in the mean
        (-0.97, 1.0, 1),  # 30 dB below either in the mean
        (0.5, -0.99, 1),
        (0.03, -0.031, 1),  # all of it 30 dB lower
    ],
)
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_channels_that_cancel_become_the_louder_one_and_it_is_said(tmp_path, left, right, heard, rate):
    speech, notes = tone(35.0, rate), []  # at 44.1 kHz more than one block
    noise = np.random.default_rng(0).normal(scale=1e-3, size=len(speech))  # common to both: all that their mean has
    path = stereo(tmp_path, left * speech + noise, right * speech + noise, rate)
    waveform = load_audio(path, notes=notes)
    np.testing.assert_array_equal(waveform, load_audio(path, channel=heard))
    assert notes == [f"its channels cancel each other in their mean: channel {heard} alone is read"]
    assert abs(np.abs(waveform).max() - 0.5 * abs((left, right)[heard])) < 0.01


@pytest.mark.parametrize(
    "right",
    [tone(1.0, 16_000), np.zeros(16_000), tone(1.0, 16_000, 1000.0), -0.0316 * tone(1.0, 16_000)],
    ids=["the same", "nothing", "another speaker", "opposite and 30 dB lower"],
)
def test_channels_that_do_not_cancel_are_averaged(tmp_path, right):
    left, notes = tone(1.0, 16_000), []
    waveform = load_audio(stereo(tmp_path, left, right), notes=notes)
    np.testing.assert_allclose(waveform, (left + right) / 2, atol=1e-6)
    assert notes == []


def test_constant_offset_hides_no_cancelling(tmp_path):
    speech, notes = 0.05 * tone(1.0, 16_000), []
    waveform = load_audio(stereo(tmp_path, 0.3 + speech, 0.3 - 0.99 * speech), notes=notes)
    assert len(notes) == 1
    np.testing.assert_allclose(waveform, 0.3 + speech, atol=1e-6)


def test_one_of_several_channels_can_be_chosen(tmp_path):
    left, right = tone(0.5, 16_000), tone(0.5, 16_000, 1000.0)
    path = stereo(tmp_path, left, right)
    np.testing.assert_allclose(load_audio(path, channel=1), right, atol=1e-7)
    np.testing.assert_allclose(load_clip(AudioClip(str(path), 0.1, 0.2, channel=0)), left[1_600:3_200], atol=1e-7)
    with pytest.raises(BadClipError, match="channel 2 was requested, but it has 2, numbered from 0"):
        load_audio(path, channel=2)


def test_bytes_of_a_file_are_read_as_the_file_is(tmp_path):
    path = tmp_path / "tone.flac"
    soundfile.write(path, tone(0.5, 44_100), 44_100)
    np.testing.assert_array_equal(load_audio(path.read_bytes(), 0.1, 0.4), load_audio(path, 0.1, 0.4))
    with pytest.raises(BadClipError, match="audio of 5 bytes: unreadable"):
        load_audio(b"hello")


@pytest.mark.parametrize(("suffix", "tolerance"), [(".flac", 1e-4), (".ogg", 0.1), (".mp3", 0.1), (".aiff", 1e-4)])
def test_compressed_formats_are_read(tmp_path, suffix, tolerance):
    path = tmp_path / f"tone{suffix}"
    soundfile.write(path, tone(1.0, 16_000), 16_000)
    waveform = load_audio(path)
    assert abs(len(waveform) - 16_000) <= 2_000  # MP3 and Vorbis may pad
    np.testing.assert_allclose(np.abs(waveform[2_000:14_000]).max(), 0.5, atol=tolerance)


def test_reading_in_blocks_equals_resampling_the_whole(tmp_path):
    path = tmp_path / "long.wav"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 65 * 22_050).astype(np.float32)
    soundfile.write(path, noise, 22_050, subtype="FLOAT")
    waveform = load_audio(path)
    whole = soxr.resample(noise, 22_050, 16_000)
    assert len(waveform) == len(whole)
    np.testing.assert_allclose(waveform, whole, atol=1e-5)


def test_a_resampler_that_loses_sound_is_an_error_and_nothing_is_padded(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", tone(0.5, 22_050), 22_050)
    whole = load_audio(tmp_path / "a.wav")
    resample = soxr.ResampleStream.resample_chunk

    class Losing(soxr.ResampleStream):
        def resample_chunk(self, block, last=False):
            return resample(self, block, last)[: None if last else -lost]

    monkeypatch.setattr(mono.soxr, "ResampleStream", Losing)
    lost = mono.MAX_FITTED - 1
    assert len(load_audio(tmp_path / "a.wav")) == len(whole) == 8_000
    lost = 10 * mono.MAX_FITTED
    with pytest.raises(BadClipError, match=r"the resampler gave 78\d\d samples in place of 8000"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", RATES)
def test_the_shortest_clips_keep_their_length(tmp_path, rate):
    path = tmp_path / "short.wav"
    soundfile.write(path, tone(0.05, rate), rate)
    assert abs(len(load_audio(path)) - 800) <= 1


def test_start_and_end_choose_the_stretch(tmp_path):
    path = tmp_path / "noise.wav"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 32_000).astype(np.float32)
    soundfile.write(path, noise, 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(path, 0.5, 1.25), noise[8_000:20_000])
    np.testing.assert_array_equal(load_audio(path, start=1.5), noise[24_000:])
    np.testing.assert_array_equal(load_audio(path, end=0.5), noise[:8_000])
    np.testing.assert_array_equal(load_audio(path, 1.0, 2.09), noise[16_000:])  # as lists round their ends


@pytest.mark.parametrize("claimed", [0xFFFFFFFF, 0x7FFFF000, 16_000 + 3_000])
def test_what_was_piped_and_what_lacks_a_few_samples_is_read(tmp_path, claimed):
    path = tmp_path / "piped.wav"
    soundfile.write(path, tone(0.5, 16_000), 16_000)
    piped = bytearray(path.read_bytes())
    struct.pack_into("<I", piped, 40, claimed)
    path.write_bytes(piped)
    assert len(load_audio(path)) == 8_000


@pytest.mark.parametrize(("suffix", "options"), CUT_FORMATS)
def test_file_that_was_cut_is_a_bad_clip_and_its_beginning_can_be_used(tmp_path, suffix, options):
    path = tmp_path / f"tone{suffix}"
    soundfile.write(path, tone(2.0, 16_000), 16_000, **options)
    start = load_audio(path, end=0.2)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadClipError, match=r"cut short, the sound ends at \S+ s and should go on to 2\.0\d* s"):
        load_audio(path)
    np.testing.assert_array_equal(load_audio(path, end=0.2), start)


def test_any_damage_is_a_bad_clip_or_finite_sound(tmp_path, monkeypatch):
    """Bytes of header and body changed at random, and the ends cut off: no other error, no endless loop, no memory."""
    monkeypatch.setattr(audio, "find_ffmpeg", lambda: None)
    generator = np.random.default_rng(0)
    whole = []
    for suffix, options in [*CUT_FORMATS, (".flac", {}), (".ogg", {}), (".wav", {"subtype": "FLOAT"}), (".caf", {})]:
        path = tmp_path / f"whole{suffix}"
        soundfile.write(path, np.stack([tone(0.3, 22_050)] * 2, axis=1), 22_050, **options)
        whole.append((path.suffix, path.read_bytes()))
    bad = 0
    for number in range(600):
        suffix, content = whole[number % len(whole)]
        damaged = bytearray(content)
        for place in generator.integers(0, 100 if number % 3 else len(damaged), size=4):
            damaged[place] = generator.integers(256)
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(damaged[: generator.integers(len(damaged))] if number % 5 == 0 else damaged)
        try:
            waveform = load_audio(path)
        except BadClipError as error:
            assert str(path) in str(error)  # noqa: PT017
            bad += 1
        else:
            assert np.isfinite(waveform).all() and np.abs(waveform).max() < 2 * LOUDEST_PEAK
    assert 100 < bad < 500


def write_bad(folder, fault):
    path = folder / f"{fault}.wav"
    samples = tone(0.5, 16_000)
    if fault == "unreadable":
        path.write_bytes(b"RIFF no sound at all")
    elif fault == "silent":
        soundfile.write(path, np.full(8_000, 5e-5), 16_000, subtype="FLOAT")
    elif fault == "empty":
        soundfile.write(path, np.zeros(0), 16_000)
    elif fault in ("NaN", "Inf"):
        samples[4_000] = float(fault)
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
    elif fault == "a folder":
        path.mkdir()
    elif fault == "a FIFO":
        os.mkfifo(path)
    elif fault == "where full scale is 1":
        soundfile.write(path, 101 * samples / 0.5, 16_000, subtype="FLOAT")
    elif fault == "65 channels":
        soundfile.write(path, np.repeat(samples[:, None], 65, axis=1), 16_000)
    elif fault == "900 Hz":
        soundfile.write(path, samples, 900)
    elif fault == "14401 s to read":
        soundfile.write(path, np.zeros(14_401 * 1_000, dtype=np.int16), 1_000)
    return path


BAD = [
    *("unreadable", "silent", "empty", "NaN", "Inf", "does not exist", "a folder", "a FIFO"),
    *("where full scale is 1", "65 channels", "900 Hz", "14401 s to read"),
]


@pytest.mark.parametrize("fault", BAD)
def test_bad_clip_is_named(tmp_path, fault):
    path = write_bad(tmp_path, fault)
    with pytest.raises(BadClipError, match="NaN or Inf" if fault in ("NaN", "Inf") else fault) as error:
        load_audio(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), MemoryError()])
@pytest.mark.parametrize("failures", [1, 2])
def test_what_fails_once_is_read_again(tmp_path, monkeypatch, error, failures):
    path, read, calls = tmp_path / "tone.wav", soundfile.SoundFile.read, []
    soundfile.write(path, tone(0.1, 16_000), 16_000)
    expected = load_audio(path)

    def fails(self, *args, **kwargs):
        calls.append(1)
        if len(calls) <= failures:
            raise error
        return read(self, *args, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "read", fails)
    if failures == 1:
        assert np.array_equal(load_audio(path), expected)
    else:
        with pytest.raises(BadClipError, match=type(error).__name__):
            load_audio(path)


def test_stretch_of_a_file_that_is_too_long_as_a_whole_is_read(tmp_path):
    path = tmp_path / "day.wav"
    write_bad(tmp_path, "14401 s to read").rename(path)
    with soundfile.SoundFile(path, "r+") as file:
        file.seek(10_000_000)
        file.write(tone(1.0, 1_000, 100.0))
    assert len(load_audio(path, 9_999.5, 10_001.5)) == 32_000


def test_start_beyond_the_end_is_a_bad_clip(tmp_path):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(0.5, 16_000), 16_000)
    with pytest.raises(BadClipError, match=r"nothing from 2 s to 3 s, the file ends at 0\.500 s"):
        load_audio(path, 2.0, 3.0)


ARITHMETIC = st.builds(
    FrameArithmetic,
    stack=st.sampled_from([1, 2, 4, 5, 8]),
    max_encoder_frames=st.sampled_from([200, 250, 1500]),
    lead_silence_s=st.sampled_from([0.0, 0.25, 1.0]),
    tail_silence_s=st.sampled_from([0.0, 0.013, 2.0]),
)


@settings(max_examples=100, deadline=None)
@given(ARITHMETIC, st.integers(1, 80_000))
def test_windows_agree_with_the_arithmetic_and_lose_no_sample(frames, num_samples):
    waveform = np.random.default_rng(num_samples).uniform(0.1, 0.5, num_samples).astype(np.float32)
    windows = clip_windows(waveform, frames)
    assert [len(window) for window in windows] == frames.window_lengths(num_samples)
    assert sum(frames.window_tokens(len(window)) for window in windows) == frames.num_tokens(num_samples)
    lead, silence = frames.lead_samples, frames.silence_samples
    speech = [window[lead : len(window) - silence + lead] for window in windows]
    joined = np.concatenate(speech)
    np.testing.assert_array_equal(joined[:num_samples], waveform)
    assert not joined[num_samples:].any()
    assert not any(window[:lead].any() or window[len(window) - silence + lead :].any() for window in windows)


@pytest.mark.slow
def test_an_hour_of_48_khz_stereo_fits_in_little_memory(tmp_path):
    path = tmp_path / "hour.wav"
    minute = np.repeat(tone(60.0, 48_000)[:, None], 2, axis=1)
    with soundfile.SoundFile(path, "w", 48_000, 2) as file:
        for _ in range(60):
            file.write(minute)
    del minute
    tracemalloc.start()
    waveform = load_audio(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(waveform) == 3600 * 16_000
    assert peak < waveform.nbytes + 60e6  # the result is 230 MB; read at once the file would be 1.4 GB more
    windows = clip_windows(waveform, FrameArithmetic())
    assert len(windows) == 120
    assert {len(window) for window in windows} == {480_000}
