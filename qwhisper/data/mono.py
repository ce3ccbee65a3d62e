"""Frames of any rate and number of channels to one channel at 16 kHz."""

import numpy as np
import soxr

from qwhisper.frames import SAMPLE_RATE

# The mean of N channels that have nothing in common has the energy sum(E_i) / N², that of equal channels N times as
# much. With less than half of the former, the channels cancel: two that are equally loud are correlated below -0.5,
# which no two microphones in a room are over a whole clip. One channel alone, or two speakers on two channels, give 1.
CANCELLED = 0.5


class Mono:
    """One channel, or the mean of all, at 16 kHz, as it grows; and how loud the channels and their mean are."""

    def __init__(self, channel: int | None):
        self._channel = channel
        self._waveform = np.empty(0, dtype=np.float32)
        self._filled = 0
        self._rate = SAMPLE_RATE
        self._resampler: soxr.ResampleStream | None = None
        self._loudness: dict[int, Loudness] = {}  # by number of channels
        self.num_frames = 0
        self.seconds = 0.0
        self.num_samples = 0

    def add(self, block: np.ndarray, rate: int) -> np.ndarray:
        """Add frames float32 [frames, channels] of a rate; return them as mono. Another rate begins a new sound."""
        channels = block.shape[1]
        self.num_frames += len(block)
        self.num_samples += block.size
        self.seconds += len(block) / rate
        one = block.mean(axis=1) if self._channel is None else block[:, min(self._channel, channels - 1)]
        if channels > 1 and self._channel is None:
            self._loudness.setdefault(channels, Loudness(channels)).add(block, one)
        if rate != self._rate:
            self._flush()
            self._rate = rate
            if rate != SAMPLE_RATE:
                self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
        self._append(one if self._resampler is None else self._resampler.resample_chunk(one))
        return one

    def loudest_of_cancelling(self) -> int | None:
        """The loudest channel where the channels cancel each other over the whole sound, or None."""
        mean = sum(loudness.energies()[-1] for loudness in self._loudness.values())
        unrelated = sum(loudness.unrelated_mean() for loudness in self._loudness.values())
        if not mean < CANCELLED * unrelated:
            return None
        longest = max(self._loudness.values(), key=lambda loudness: loudness.num_frames)
        return int(longest.energies()[:-1].argmax())

    def finish(self) -> np.ndarray:
        self._flush()
        self._waveform.resize(self._filled, refcheck=False)
        return self._waveform

    def _flush(self) -> None:
        if self._resampler is not None:
            self._append(self._resampler.resample_chunk(np.empty(0, dtype=np.float32), last=True))
            self._resampler = None

    def _append(self, samples: np.ndarray) -> None:
        filled = self._filled + len(samples)
        if filled > len(self._waveform):
            # Grown in place: what the header claims is no reason to ask for memory.
            self._waveform.resize(max(filled, len(self._waveform) * 9 // 8), refcheck=False)
        self._waveform[self._filled : filled] = samples
        self._filled = filled


class Loudness:
    """Energies, without the constant part, of channels and (the last) of their mean."""

    def __init__(self, channels: int):
        self.num_frames = 0
        self._sums, self._squares = np.zeros(channels + 1), np.zeros(channels + 1)

    def add(self, block: np.ndarray, mean: np.ndarray) -> None:
        self.num_frames += len(block)
        for index, channel in enumerate([*block.T, mean]):
            self._sums[index] += channel.sum(dtype=np.float64)
            self._squares[index] += np.einsum("i,i->", channel, channel, dtype=np.float64)

    def energies(self) -> np.ndarray:
        return self._squares - self._sums**2 / self.num_frames

    def unrelated_mean(self) -> float:
        """The energy that the mean had if the channels had nothing in common."""
        channels = self.energies()[:-1]
        return channels.sum() / len(channels) ** 2
