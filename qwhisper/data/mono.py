"""Converts frames of any rate and number of channels to one channel at 16 kHz."""

import numpy as np
import soxr

from qwhisper.frames import SAMPLE_RATE, resampled_length

# The mean of N channels has the energy sum(C) / N², where C is their covariance: trace(C) / N² if they have nothing in
# common, N times as much if they are equal. Below half of the former they cancel: two equally loud ones are correlated
# below -0.5, which does not happen with two microphones in a room over a whole clip. One channel alone, or two speakers
# on two channels, give 1.
CANCELLED = 0.5
# A resampler rounds a length in its own way: soxr gives `resampled_length` or a sample less [measured, 1 to 768 kHz].
MAX_FITTED = 16


class Mono:
    """Collects one channel, or the mean of all, at 16 kHz; and the loudness of the channels and of their mean.

    Frames of one rate become `resampled_length` samples, so that a header alone gives the number of samples of a clip.
    """

    def __init__(self, channel: int | None):
        self._channel = channel
        self._waveform = bytearray()  # grows in place; NumPy 2.5 copies an array that is resized
        self._rate = SAMPLE_RATE
        self._resampler: soxr.ResampleStream | None = None
        self._frames_of_rate = 0  # since the last change of rate
        self._start_of_rate = 0  # bytes of the waveform before them
        self._covariances: dict[int, Covariance] = {}  # by number of channels
        self.num_frames = 0
        self.seconds = 0.0
        self.num_samples = 0

    def add(self, block: np.ndarray, rate: int) -> np.ndarray:
        """Add frames float32 [frames, channels] of a rate; return them as mono. Another rate begins a new sound."""
        channels = block.shape[1]
        self.num_frames += len(block)
        self.num_samples += block.size
        self.seconds += len(block) / rate
        one = self._one(block)
        if channels > 1 and self._channel is None:
            self._covariances.setdefault(channels, Covariance(channels)).add(block)
        if rate != self._rate:
            self._flush()
            self._rate, self._frames_of_rate, self._start_of_rate = rate, 0, len(self._waveform)
            if rate != SAMPLE_RATE:
                self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
        self._frames_of_rate += len(block)
        self._append(one if self._resampler is None else self._resampler.resample_chunk(one))
        return one

    def _one(self, block: np.ndarray) -> np.ndarray:
        channels = block.shape[1]
        if channels == 1:
            return block[:, 0]
        if self._channel is not None:
            return np.ascontiguousarray(block[:, min(self._channel, channels - 1)])
        return block @ np.full(channels, 1 / channels, dtype=np.float32)

    def loudest_of_cancelling(self) -> int | None:
        """The loudest channel if the channels cancel each other over the whole sound, or None."""
        values = [covariance.value() for covariance in self._covariances.values()]
        mean = sum(value.sum() / len(value) ** 2 for value in values)
        unrelated = sum(value.trace() / len(value) ** 2 for value in values)
        if not mean < CANCELLED * unrelated:
            return None
        longest = max(self._covariances.values(), key=lambda covariance: covariance.num_frames)
        return int(longest.value().diagonal().argmax())

    def finish(self) -> np.ndarray:
        """The whole waveform, float32 [samples] at 16 kHz."""
        self._flush()
        return np.frombuffer(self._waveform, dtype=np.float32)

    def _flush(self) -> None:
        if self._resampler is not None:
            self._append(self._resampler.resample_chunk(np.empty(0, dtype=np.float32), last=True))
            self._resampler = None
            self._fit(resampled_length(self._frames_of_rate, self._rate))

    def _fit(self, num_samples: int) -> None:
        """Cut or pad what the resampler gave for the frames of one rate to its length."""
        end = self._start_of_rate + 4 * num_samples
        missing = (end - len(self._waveform)) // 4
        if abs(missing) > MAX_FITTED:
            raise RuntimeError(f"the resampler gave {num_samples - missing} samples in place of {num_samples}")
        del self._waveform[end:]
        self._waveform += bytes(end - len(self._waveform))

    def _append(self, samples: np.ndarray) -> None:
        self._waveform += samples.astype(np.float32, copy=False).tobytes()


class Covariance:
    """Running covariance of channels, without their constant parts."""

    def __init__(self, channels: int):
        self.num_frames = 0
        self._sums, self._products = np.zeros(channels), np.zeros((channels, channels))

    def add(self, block: np.ndarray) -> None:
        """block: float32 [frames, channels]."""
        exact = block.astype(np.float64)
        self.num_frames += len(block)
        self._sums += np.ones(len(exact)) @ exact  # NumPy's own sums over a short axis are 20 times as slow
        self._products += exact.T @ exact

    def value(self) -> np.ndarray:
        """Float64 [channels, channels], summed over the frames."""
        return self._products - np.outer(self._sums, self._sums) / self.num_frames
