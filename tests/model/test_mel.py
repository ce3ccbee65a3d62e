import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from qwhisper.frames import mel_frames
from qwhisper.model.mel import packed_log_mel
from tests.model.parts import noise

LENGTHS = [800, 16_001, 5_000, 48_123, 400]


def log_mel(waveform: np.ndarray, bins: int = 80) -> torch.Tensor:
    return packed_log_mel(torch.from_numpy(waveform), [len(waveform)], bins)[0]


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("num_samples", [480_000, 16_001, 800])
def test_equals_whisper_feature_extractor(bins, num_samples):
    extractor = WhisperFeatureExtractor(feature_size=bins)
    waveform = noise(num_samples) * np.linspace(0, 2, num_samples, dtype=np.float32)
    expected = extractor(waveform, sampling_rate=16_000, padding="longest", truncation=False).input_features[0].T
    features = log_mel(waveform, bins)
    assert features.shape == expected.shape == (mel_frames(num_samples), bins)
    np.testing.assert_allclose(features.numpy(), expected, atol=2e-5)


def test_a_window_does_not_depend_on_its_neighbours():
    windows = [noise(n, seed) * 10**-seed for seed, n in enumerate(LENGTHS)]
    packed, lengths = packed_log_mel(torch.from_numpy(np.concatenate(windows)), LENGTHS, 80)
    assert lengths == [mel_frames(n) for n in LENGTHS]
    for piece, window in zip(packed.split(lengths), windows, strict=True):
        # Equal to the last bit where the matrix product with the filters does not depend on its number of rows.
        torch.testing.assert_close(piece, log_mel(window), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_samples", [1, 200, 399])
def test_a_rest_shorter_than_one_stft_window_is_filled_with_zeros(num_samples):
    waveform = noise(num_samples)
    assert torch.equal(log_mel(waveform), log_mel(np.pad(waveform, (0, 400 - num_samples))))


def test_a_long_window_is_computed_in_blocks_with_the_same_result(monkeypatch):
    whole = log_mel(noise(50_000))
    monkeypatch.setattr("qwhisper.model.mel.FRAMES_AT_ONCE", 7)
    torch.testing.assert_close(log_mel(noise(50_000)), whole, atol=1e-6, rtol=1e-6)


def test_lengths_that_do_not_fit_the_waveforms_are_refused():
    with pytest.raises(ValueError, match="sum to 900 samples, but the waveforms have 1000"):
        packed_log_mel(torch.zeros(1000), [400, 500], 80)
