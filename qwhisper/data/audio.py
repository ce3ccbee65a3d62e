"""Audio files to 16 kHz mono waveforms, and waveforms to the windows that the encoder hears."""

from pathlib import Path

import numpy as np
import soundfile
import soxr

from qwhisper.errors import BadClipError
from qwhisper.frames import SAMPLE_RATE, FrameArithmetic

BLOCK_SECONDS = 30  # an hour of 48 kHz stereo is 1.4 GB as float32; read in blocks it never exists as a whole
SILENCE_PEAK = 1e-4  # below this no sample differs from dither


def load_audio(path: str | Path, start: float | None = None, end: float | None = None) -> np.ndarray:
    """The stretch from `start` to `end` (seconds; None: the file's edge) as float32 [samples], mono, 16 kHz.

    Any sample rate, any number of channels (their mean), any length. Raises BadClipError where the file can't be read,
    the stretch is empty, or the sound is not finite or silent.
    """
    try:
        with soundfile.SoundFile(path) as file:
            waveform = _read_stretch(file, path, start or 0.0, end)
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        raise BadClipError(f"{path}: unreadable audio ({error}); convert it to WAV or FLAC, or leave it out") from error
    peak = float(max(waveform.max(), -waveform.min()))  # np.abs would copy an hour of audio
    if peak < SILENCE_PEAK:
        raise BadClipError(f"{path}: silent (peak {peak:.1e}) {_stretch_name(start, end)}; check the recording")
    return waveform


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


def _read_stretch(file: soundfile.SoundFile, path: str | Path, start: float, end: float | None) -> np.ndarray:
    rate = file.samplerate
    first, last = round(start * rate), file.frames if end is None else min(round(end * rate), file.frames)
    if file.frames == 0:
        raise BadClipError(f"{path}: empty, no samples in it; leave it out")
    if first >= last:
        raise BadClipError(f"{path}: nothing {_stretch_name(start, end)}, the file ends at {file.frames / rate:.3f} s")
    file.seek(first)
    # The file's header gives the length; the few samples more are for the resampler's rounding.
    waveform = np.empty(int((last - first) * SAMPLE_RATE / rate) + 16, dtype=np.float32)
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
    filled = 0
    remaining = last - first
    while remaining:
        block = file.read(min(remaining, BLOCK_SECONDS * rate), dtype="float32", always_2d=True).mean(axis=1)
        if not np.isfinite(block).all():
            raise BadClipError(f"{path}: NaN or Inf among the samples; export it again")
        remaining = remaining - len(block) if len(block) else 0  # a file cut short ends before its header says
        if resampler is not None:
            block = resampler.resample_chunk(block, last=remaining == 0)
        waveform[filled : filled + len(block)] = block
        filled += len(block)
    if filled == 0:
        raise BadClipError(f"{path}: empty {_stretch_name(start, end)}; leave it out")
    return waveform[:filled]


def _stretch_name(start: float | None, end: float | None) -> str:
    return f"from {start or 0:g} s to {'its end' if end is None else f'{end:g} s'}"
