"""Audio files that are broken, samples that are no sound, and sound that only looks wrong."""

import random
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import soxr

from qwhisper.data import audio, dialogue_audio, mono, rows
from qwhisper.data.audio import load_audio
from qwhisper.frames import FrameArithmetic
from tests.small import tone
from tests.test_faults import broken_data as broken
from tests.test_faults.broken_data import NAMED, RIGHT, BrokenRun, unchecked, write_float, write_tone
from tests.test_faults.matrix import fault
from tests.train.helpers import read_lines

HOUR = 3600


@pytest.fixture
def run(arguments, tmp_path):
    return BrokenRun(arguments, tmp_path)


def cut_in_half(write):
    def write_half(path: Path) -> None:
        write(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])

    return write_half


def patched(write, offset: int, layout: str, value: int):
    """A file whose header says something else."""

    def write_patched(path: Path) -> None:
        write(path)
        header = bytearray(path.read_bytes())
        struct.pack_into(layout, header, offset, value)
        path.write_bytes(header)

    return write_patched


def flac_claiming(num_frames: int):
    """The last 32 bits of STREAMINFO's 36; what a test needs more is in the 4 before them."""

    def write_flac(path: Path) -> None:
        write_tone(path)
        header = bytearray(path.read_bytes())
        header[21] = header[21] & 0xF0 | num_frames >> 32
        struct.pack_into(">I", header, 22, num_frames & 0xFFFFFFFF)
        path.write_bytes(header)

    return write_flac


# Broken files.


@fault("random bytes in a .wav", of="data", guarantee=NAMED, without=broken.decoder_errors_let_through)
def test_random_bytes(run):
    run.named(run.train(lambda path: path.write_bytes(random.Random(0).randbytes(5_000))), "unreadable")


@fault("a WAV cut in half", of="data", guarantee=NAMED, without=unchecked(audio, "check_complete"))
def test_cut_wav(run):
    run.named(run.train(cut_in_half(write_tone)), "cut short, the sound ends at 0.149 s and should go on to 0.300 s")


@fault("an MP3 cut in half", of="data", guarantee=NAMED, without=unchecked(audio, "check_complete"))
def test_cut_mp3(run):
    run.named(run.read(cut_in_half(lambda path: write_tone(path, 2.0)), clip="d3.mp3"), "cut short")


@fault("a FLAC cut in half", of="data", guarantee=NAMED, without=broken.decoder_errors_let_through)
def test_cut_flac(run):
    run.named(run.read(cut_in_half(write_tone), clip="d3.flac"), "unreadable", "its header claims 0.300 s")


@fault("a file of zero bytes", of="data", guarantee=NAMED, without=broken.silence_stands_in)
def test_empty_file(run):
    run.named(run.train(lambda path: path.write_bytes(b"")), "empty, no byte in it")


@fault("a header without a sample after it", of="data", guarantee=NAMED, without=broken.no_rejections)
def test_header_alone(run):
    run.named(run.read(lambda path: write_float(path, np.zeros(0))), "empty, no samples in it")


@fault("a WAV header that claims hours", of="data", guarantee=NAMED, without=unchecked(audio, "check_complete"))
def test_wav_claims_hours(run):
    run.named(run.read(patched(write_tone, 40, "<I", 2 * HOUR * 32_000)), "should go on to 7200.000 s")


@fault("a FLAC header that claims an hour", of="data", guarantee=NAMED, without=unchecked(audio, "check_complete"))
def test_flac_claims_an_hour(run):
    run.named(run.read(flac_claiming(HOUR * 16_000), clip="d3.flac"), "ends at 0.300 s and should go on to 3600.000 s")


@fault(
    "a FLAC header that claims 2^36 samples",
    of="data",
    guarantee="refused by its header (2 hours in a dialogue at most), before memory is taken; quarantined and named",
    without=unchecked(audio, "check_header"),
)
def test_flac_claims_all_memory(run):
    run.named(run.read(flac_claiming(2**36 - 1), clip="d3.flac"), "its header claims", "s to read (at most 7200)")


@fault(
    "a thousand channels",
    of="data",
    guarantee="refused by its header (64 channels at most); quarantined and named",
    without=unchecked(audio, "check_header"),
)
def test_thousand_channels(run):
    run.named(
        run.read(lambda path: write_float(path, np.repeat(tone(440, 0.1)[:, None], 1000, axis=1))), "1000 channels"
    )


@fault(
    "a header that states 4 MHz",
    of="data",
    guarantee="refused by its header (1 to 768 kHz); quarantined and named",
    without=unchecked(audio, "check_header"),
)
def test_absurd_rate(run):
    run.named(
        run.read(patched(lambda path: write_tone(path, 20.0), 24, "<I", 4_000_000)), "4000000 Hz (1000 to 768000)"
    )


# Samples that are no sound.


@fault("a clip of NaN", of="data", guarantee=NAMED, without=unchecked(audio, "check_samples"))
def test_all_nan(run):
    run.named(run.read(lambda path: write_float(path, np.full(4_800, np.nan))), "NaN or Inf among the samples")


@fault("a clip with Inf in it", of="data", guarantee=NAMED, without=unchecked(audio, "check_samples"))
def test_inf(run):
    run.named(run.read(lambda path: write_float(path, np.r_[tone(440, 0.2), np.inf, -np.inf])), "NaN or Inf")


@fault("one NaN sample in a clip", of="data", guarantee=NAMED, without=unchecked(audio, "check_samples"))
def test_one_nan(run):
    run.named(run.read(lambda path: write_float(path, np.r_[tone(440, 0.2), np.nan, tone(440, 0.1)])), "NaN or Inf")


def only_finite(monkeypatch) -> None:
    def check(block, wanted):
        if not np.isfinite(block).all():
            raise wanted.fault("NaN or Inf")

    monkeypatch.setattr(audio, "check_samples", check)


@fault("samples of 1e30, finite but of no use", of="data", guarantee=NAMED, without=only_finite)
def test_absurd_amplitude(run):
    run.named(
        run.read(lambda path: write_float(path, 1e30 * tone(440, 0.3))), "samples up to 3.0e+29, where full scale is 1"
    )


@fault("silence", of="data", guarantee=NAMED, without=unchecked(audio, "check_audible"))
def test_silence(run):
    run.named(run.read(lambda path: write_float(path, np.full(4_800, 5e-5))), "silent")


def loud_enough(waveform, wanted) -> None:
    if np.abs(waveform).max() < audio.SILENCE_PEAK:
        raise wanted.fault("silent")


@fault(
    "a constant offset and no sound",
    of="data",
    guarantee=NAMED,
    without=lambda monkeypatch: monkeypatch.setattr(audio, "check_audible", loud_enough),
)
def test_offset(run):
    run.named(run.read(lambda path: write_float(path, np.full(4_800, 0.5))), "silent")


# Sound that only looks wrong.


@fault(
    "two channels that cancel each other",
    of="data",
    guarantee="one channel is heard instead of silence, and this is reported",
    without=lambda monkeypatch: monkeypatch.setattr(mono, "CANCELLED", 0.0),
)
def test_opposite_channels(run):
    left = tone(440, 0.3)
    run.right(run.train(lambda path: write_float(path, np.stack([left, -left], axis=1))))
    (said,) = (line["what"] for line in read_lines(run.output / "events.jsonl") if line["kind"] == "sample_changed")
    assert said == [f"{run.data / 'd3.wav'}: its channels cancel each other in their mean: channel 0 alone is read"]


class NoResampler:
    def __init__(self, *args, **kwargs):
        pass

    def resample_chunk(self, block, last=False):
        return block


@fault(
    "clips at 8, 44.1 and 192 kHz",
    of="data",
    guarantee=RIGHT,
    without=lambda monkeypatch: monkeypatch.setattr(soxr, "ResampleStream", NoResampler),
)
@pytest.mark.parametrize("rate", [8_000, 44_100, 192_000])
def test_rates(run, rate):
    outcome = run.read(lambda path: write_tone(path, 0.3, rate))
    run.right(outcome)
    waveform = load_audio(run.data / "d3.wav")
    assert abs(len(waveform) - 4_800) <= 1
    assert abs(np.abs(np.fft.rfft(waveform)).argmax() - 440 * 0.3) <= 1


def thirty_seconds_alone(waveform, frames):
    return [waveform[:480_000]]


@fault(
    "a clip of an hour",
    of="data",
    guarantee="heard whole, in windows of at most 30 s",
    without=lambda monkeypatch: monkeypatch.setattr(dialogue_audio, "clip_windows", thirty_seconds_alone),
)
def test_hour(tmp_path):
    with wave.open(str(tmp_path / "hour.wav"), "wb") as file:
        file.setparams((1, 1, 1_000, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).integers(0, 256, HOUR * 1_000, dtype=np.uint8).tobytes())
    waveform, frames = load_audio(tmp_path / "hour.wav"), FrameArithmetic()
    assert len(waveform) == HOUR * 16_000
    windows = dialogue_audio.clip_windows(waveform, frames)
    assert sum(map(len, windows)) == len(waveform)
    assert max(map(len, windows)) == 30 * 16_000
    assert sum(frames.window_tokens(len(window)) for window in windows) == frames.num_tokens(len(waveform)) == 45_000


# Stretches.


def stretch(start: float, end: float):
    return lambda record: record["messages"][0]["content"][0].update(start=start, end=end)


@fault("a stretch that begins after the file has ended", of="data", guarantee=NAMED, without=broken.silence_stands_in)
def test_start_beyond(run):
    run.named(run.read(change=stretch(2.0, 3.0)), "nothing from 2 s to 3 s, the file ends at 0.300 s")


@fault(
    "a stretch that ends after the file",
    of="data",
    guarantee="a missing part of more than 0.1 s is named; no answer to less than was said is learned",
    without=unchecked(audio, "check_end"),
)
def test_end_beyond(run):
    run.named(
        run.read(change=stretch(0.1, 3.0)), "the sound ends at 0.300 s and should go on to 3.000 s", "correct `end`"
    )


@fault(
    "more audio than --max_length has room for",
    of="data",
    guarantee="the dialogue is quarantined and named; no answer is learned without what it answers",
    without=unchecked(rows, "refuse_to_drop_audio"),
)
def test_audio_longer_than_a_row(run):
    outcome = run.train(lambda path: write_tone(path, 10.0), max_length=60)
    run.named(outcome, "127 tokens of audio and the reply do not fit into max_length", checked=False)


def write_fifty_minutes(path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 1, 1_000, 0, "NONE", ""))
        file.writeframes(bytes(3_000 * 1_000))


@fault(
    "a dialogue that hears one clip again and again, for hours",
    of="data",
    guarantee="refused by its headers (2 hours at most), before any of it is decoded; quarantined and named",
    without=unchecked(dialogue_audio, "check_dialogue_seconds"),
)
def test_hours_in_one_dialogue(run):
    repeat = lambda record: record["messages"][0].update(content=[*record["messages"][0]["content"][:1] * 8, "Pitch?"])  # noqa: E731
    run.named(run.read(write_fifty_minutes, change=repeat), "24000 s of audio in 8 clips, and a dialogue may have 7200")
