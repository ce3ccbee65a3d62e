"""Whisper's log-mel spectrogram for many windows at once, on the device that trains, without padding.

Frames are gathered straight from the windows laid end to end, so a window's features cannot depend on its neighbours or
on the longest clip of the batch. Equal to `transformers.WhisperFeatureExtractor` (its torch path) to rounding.
"""

from functools import lru_cache

import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from qwhisper.frames import HOP_LENGTH, N_FFT, SAMPLE_RATE, mel_frames

FRAMES_AT_ONCE = 30_000  # 5 minutes: the gathered frames and their spectrum then take about 100 MB


@lru_cache(maxsize=4)
def _filters(num_mel_bins: int, device: torch.device) -> Tensor:
    """Slaney mel filters [N_FFT // 2 + 1, num_mel_bins], float32."""
    filters = mel_filter_bank(
        num_frequency_bins=N_FFT // 2 + 1,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).to(device=device, dtype=torch.float32)


def _window_log_mel(window: Tensor, num_mel_bins: int) -> Tensor:
    """log10 mel power [frames, num_mel_bins] of one window [samples], at least -10, before Whisper's normalisation."""
    padded = torch.nn.functional.pad(window, (0, max(0, N_FFT - window.shape[0])))
    padded = torch.nn.functional.pad(padded[None], (N_FFT // 2, N_FFT // 2), mode="reflect")[0]
    frames = padded.unfold(0, N_FFT, HOP_LENGTH)[: mel_frames(window.shape[0])]
    hann = torch.hann_window(N_FFT, device=window.device)
    filters = _filters(num_mel_bins, window.device)
    blocks = [torch.fft.rfft(block * hann).abs().square() @ filters for block in frames.split(FRAMES_AT_ONCE)]
    return torch.cat(blocks).clamp(min=1e-10).log10()


def packed_log_mel(waveforms: Tensor, lengths: list[int], num_mel_bins: int) -> tuple[Tensor, list[int]]:
    """Log-mel features of windows laid end to end.

    waveforms: [sum(lengths)] float32, 16 kHz; lengths: samples of each window.
    Returns ([total_mel_frames, num_mel_bins] float32, mel frames of each window). Each window is normalised by itself:
    clamped to 8 below its own maximum, then (x + 4) / 4, as Whisper was trained (Radford et al., 2022, section 2.2).
    """
    if sum(lengths) != waveforms.shape[0]:
        raise ValueError(f"window lengths sum to {sum(lengths)} samples, but the waveforms have {waveforms.shape[0]}")
    features = []
    for window in waveforms.float().split(lengths):
        log_mel = _window_log_mel(window, num_mel_bins)
        features.append((log_mel.clamp(min=log_mel.max() - 8.0) + 4.0) / 4.0)
    return torch.cat(features), [f.shape[0] for f in features]
