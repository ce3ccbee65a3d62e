"""Audio files to 16 kHz mono waveforms, and waveforms to the windows that the encoder hears."""

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr

from qwhisper.errors import BadClipError
from qwhisper.frames import SAMPLE_RATE, FrameArithmetic

# What a header may claim of the stretch that is read; whatever claims more is refused before any of it is decoded.
MAX_SECONDS = 4 * 3600  # 0.9 GB of waveform
MAX_CHANNELS = 64
SAMPLE_RATES = (1_000, 768_000)
MAX_SAMPLES = 2**33  # of all channels together; an hour of 8 channels at 192 kHz has 5.5e9

BLOCK_SAMPLES = 2**20  # an hour of 48 kHz stereo is 1.4 GB as float32; read in blocks it never exists as a whole
SILENCE_PEAK = 1e-4  # below this no sample differs from dither
LOUDEST_PEAK = 100.0  # 40 dB above full scale: no sound, but integers stored as floats, or broken
MISSING_SECONDS = 0.1  # the padding of a decoder and the rounding of a list of stretches; more is speech that is lost

# libsndfile takes a file that was cut for a short one: the bytes that its header claims stand in the log alone.
CLAIM = re.compile(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)")
UNKNOWN_LENGTH = 0x7FFF0000  # bytes; what writes to a pipe can't know the length, and claims this or more


def load_audio(
    path: str | Path | bytes, start: float | None = None, end: float | None = None, channel: int | None = None
) -> np.ndarray:
    """The stretch from `start` to `end` (seconds; None: the file's edge) as float32 [samples], mono, 16 kHz.

    Any sample rate from 1 to 768 kHz, up to 64 channels (their mean), up to 4 hours and 2^33 samples of all channels
    together. Raises BadClipError where that is exceeded, the path is no file, can't be read or decoded, the stretch is
    empty or goes on more than 0.1 s after the sound has ended, or the sound is not finite, silent or absurdly loud.
    """
    name = "the audio data" if isinstance(path, bytes) else path
    with _faults_named(name):
        try:
            return _load(path, name, start, end, channel)
        except (OSError, MemoryError, soundfile.LibsndfileError):
            pass  # perhaps of this moment alone: of a network drive, or of another process that took the memory
        return _load(path, name, start, end, channel)


def _load(
    source: str | Path | bytes, path: str | Path, start: float | None, end: float | None, channel: int | None
) -> np.ndarray:
    if not isinstance(source, bytes) and (fault := file_fault(path)):
        raise BadClipError(f"{path} {fault}; leave it out")
    with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        if channel is not None and channel >= file.channels:
            raise BadClipError(f"{path}: channel {channel} of {file.channels} (counted from 0); give another `channel`")
        waveform = _read_stretch(file, path, start or 0.0, end, channel)
    _check_audible(waveform, path, _stretch_name(start, end))
    return waveform


def file_fault(path: str | Path) -> str | None:
    """What keeps `path` from being read as a file, or None. Nothing is opened: a FIFO would wait for its writer."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"can't be reached ({error.strerror})"
    if stat.S_ISREG(mode):
        return None
    kinds = {"a folder": stat.S_ISDIR, "a FIFO": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return f"is {next((kind for kind, matches in kinds.items() if matches(mode)), 'a device')}, not a file"


def clip_windows(waveform: np.ndarray, frames: FrameArithmetic) -> list[np.ndarray]:
    """Windows, float32 [samples] each, of a waveform float32 [samples], with silence around the speech of each.

    Their lengths are `frames.window_lengths(len(waveform))`, their tokens `frames.num_tokens(len(waveform))`.
    """
    windows, start = [], 0
    for length in frames.window_lengths(len(waveform)):
        piece = waveform[start : start + length - frames.silence_samples]
        window = np.zeros(length, dtype=np.float32)
        window[frames.lead_samples : frames.lead_samples + len(piece)] = piece
        windows.append(window)
        start += len(piece)
    return windows


@contextmanager
def _faults_named(path: str | Path) -> Iterator[None]:
    """Whatever a decoder makes of a broken file, out of memory for what a header claims too, is the file's fault."""
    try:
        yield
    except BadClipError:
        raise
    except Exception as error:
        what = str(error) if isinstance(error, soundfile.LibsndfileError) else f"{type(error).__name__}: {error}"
        raise BadClipError(f"{path}: unreadable audio ({what}); convert it to WAV or FLAC, or leave it out") from error


def _read_stretch(
    file: soundfile.SoundFile, path: str | Path, start: float, end: float | None, channel: int | None
) -> np.ndarray:
    rate = file.samplerate
    first = round(start * rate)
    last = _claimed_frames(file) if end is None else round(end * rate)
    _check_header(file, path, last - first)
    if file.frames == 0:
        raise BadClipError(f"{path}: empty, no samples in it; leave it out")
    if first >= file.frames:
        raise BadClipError(f"{path}: nothing {_stretch_name(start, end)}, the file ends at {file.frames / rate:.3f} s")
    file.seek(first)
    waveform, num_frames = _decode(file, path, min(last, file.frames) - first, channel)
    _check_complete(path, should_end=last / rate, ends=(first + num_frames) / rate)
    if len(waveform) == 0:
        raise BadClipError(f"{path}: empty {_stretch_name(start, end)}; leave it out")
    return waveform


def _decode(
    file: soundfile.SoundFile, path: str | Path, num_frames: int, channel: int | None
) -> tuple[np.ndarray, int]:
    """Up to `num_frames` from where the file stands, as mono at 16 kHz, and how many there were."""
    rate, remaining, filled = file.samplerate, num_frames, 0
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
    # The few samples more are for the resampler's rounding; memory that no sample reaches is never touched.
    waveform = np.empty(int(num_frames * SAMPLE_RATE / rate) + 16, dtype=np.float32)
    ended = False
    while not ended:
        frames = min(remaining, max(1, BLOCK_SAMPLES // file.channels))
        block = file.read(frames, dtype="float32", always_2d=True)
        block = block.mean(axis=1) if channel is None else block[:, channel]
        _check_samples(block, path)
        remaining -= len(block)
        ended = remaining == 0 or len(block) == 0  # a file cut short ends before its header says
        if resampler is not None:
            block = resampler.resample_chunk(block, last=ended)
        waveform[filled : filled + len(block)] = block
        filled += len(block)
    return waveform[:filled], num_frames - remaining


def _claimed_frames(file: soundfile.SoundFile) -> int:
    """The length by the header, also where the file is shorter."""
    claim = CLAIM.search(file.extra_info)
    if claim is None:
        return file.frames
    claimed, there = int(claim[1]), int(claim[2])
    return file.frames if claimed >= UNKNOWN_LENGTH else round(file.frames * claimed / max(there, 1))


def _check_header(file: soundfile.SoundFile, path: str | Path, num_frames: int) -> None:
    rate, channels, seconds = file.samplerate, file.channels, num_frames / file.samplerate
    low, high = SAMPLE_RATES
    limits = [
        (channels <= MAX_CHANNELS, f"{channels} channels (at most {MAX_CHANNELS})"),
        (low <= rate <= high, f"{rate} Hz ({low} to {high})"),
        (seconds <= MAX_SECONDS, f"{seconds:.5g} s to read (at most {MAX_SECONDS})"),
        (num_frames * channels <= MAX_SAMPLES, f"{num_frames * channels:.2g} samples (at most {MAX_SAMPLES:.2g})"),
    ]
    if exceeded := [claim for kept, claim in limits if not kept]:
        raise BadClipError(
            f"{path}: its header claims {', '.join(exceeded)}; leave it out or, if that is true, convert it or give "
            "`start` and `end`"
        )


def _check_samples(block: np.ndarray, path: str | Path) -> None:
    if not np.isfinite(block).all():
        raise BadClipError(f"{path}: NaN or Inf among the samples; export it again")
    peak = float(max(block.max(initial=0.0), -block.min(initial=0.0)))
    if peak > LOUDEST_PEAK:
        raise BadClipError(f"{path}: samples up to {peak:.1e}, where full scale is 1; export it again")


def _check_complete(path: str | Path, *, should_end: float, ends: float) -> None:
    if should_end - ends > MISSING_SECONDS:
        raise BadClipError(
            f"{path}: cut short, the sound ends at {ends:.3f} s and should go on to {should_end:.3f} s; copy it again, "
            "or mend `end`"
        )


def _check_audible(waveform: np.ndarray, path: str | Path, stretch: str) -> None:
    peak = (float(waveform.max()) - float(waveform.min())) / 2  # a constant offset is no sound
    if peak < SILENCE_PEAK:
        raise BadClipError(f"{path}: silent (peak {peak:.1e}) {stretch}; check the recording")


def _stretch_name(start: float | None, end: float | None) -> str:
    return f"from {start or 0:g} s to {'its end' if end is None else f'{end:g} s'}"
