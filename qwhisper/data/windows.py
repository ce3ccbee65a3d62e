"""A clip's waveform cut into the windows that the encoder hears. Knows no files; numpy alone."""

import numpy as np

from qwhisper.frames import FrameArithmetic


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
