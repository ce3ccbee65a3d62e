"""Whisper's log-mel spectrogram for many windows at once, on the device that trains, without padding.

Windows lie in one row with their margins, so a window's features cannot depend on its neighbours or on the longest clip
of the batch. Equal to `transformers.WhisperFeatureExtractor` (its torch path) to rounding.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from qwhisper.frames import HOP_LENGTH, N_FFT, SAMPLE_RATE, mel_frames
from qwhisper.model.audio_layout import AudioSizes, MelLayout, mel_layout, on_device, waveform_row

MEL_VERSION = 1  # of the numbers computed here: raise it if they change, cached features depend on them
FRAMES_AT_ONCE = 30_000  # 5 minutes: the frames and their spectrum then take about 100 MB


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


def log_mel(row: Tensor, layout: MelLayout, num_mel_bins: int) -> Tensor:
    """Log-mel features [mel frames, num_mel_bins] float32 of a row of samples, see `audio_layout.waveform_row`.

    Each window is normalised by itself: clamped to 8 below its own maximum, then (x + 4) / 4, as Whisper was trained
    (Radford et al., 2022, section 2.2).
    """
    hann = torch.hann_window(N_FFT, device=row.device)
    filters = _filters(num_mel_bins, row.device)
    blocks = row.unfold(0, N_FFT, HOP_LENGTH).split(FRAMES_AT_ONCE)
    power = torch.cat([torch.fft.rfft(block * hann).abs().square() @ filters for block in blocks])
    features = power.index_select(0, layout.frames).clamp(min=1e-10).log10()
    loudest = features.new_full((layout.num_windows + 1,), -math.inf)
    loudest = loudest.scatter_reduce(0, layout.windows, features.amax(-1), "amax")
    floor = loudest.index_select(0, layout.windows) - 8.0
    return (torch.maximum(features, floor[:, None]) + 4.0) / 4.0


def packed_log_mel(waveforms: Tensor, lengths: list[int], num_mel_bins: int) -> tuple[Tensor, list[int]]:
    """Log-mel features of windows laid end to end.

    waveforms: [sum(lengths)] float32, 16 kHz; lengths: samples of each window.
    Returns ([total_mel_frames, num_mel_bins] float32, mel frames of each window); see `log_mel`.
    """
    if sum(lengths) != waveforms.shape[0]:
        raise ValueError(f"window lengths sum to {sum(lengths)} samples, but the waveforms have {waveforms.shape[0]}")
    mel_lengths = [mel_frames(n) for n in lengths]
    sizes = AudioSizes(windows=len(lengths), mel_frames=sum(mel_lengths))
    windows = [window.numpy() for window in waveforms.detach().float().cpu().split(lengths)]
    row = waveform_row(windows, sizes).to(waveforms.device)
    return log_mel(row, on_device(mel_layout(lengths, sizes), row.device), num_mel_bins), mel_lengths
