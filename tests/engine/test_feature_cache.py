"""Features as they are stored, and packs that are made of them instead of waveforms."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qwhisper.data.feature_store import EncodedWindow, FeatureFolder, FeatureWriter
from qwhisper.data.features import FeatureReader, MissingClip
from qwhisper.data.rows import Sample, Uncached
from qwhisper.engine.batch import Batch, pack_shape, packed_batch, padded_batch
from qwhisper.engine.executor import Executor
from qwhisper.engine.feature_cache import FeatureCache, rounded
from qwhisper.engine.forward import by_sample, run_pack
from qwhisper.memory import is_out_of_memory
from tests.model.parts import make_sample
from tests.small import VOCABULARY, small_model

CLIPS = [[800, 5000], [16_001], [], [7000]]
TOLERANCE = {"fp16": 1e-3, "int8": 3e-2}  # of losses of about 20 nats
formats = pytest.mark.parametrize("stored_as", TOLERANCE)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = small_model()
    model.config.audio_lead_silence, model.config.audio_tail_silence = 0.02, 0.3
    return model


def cache_of(model, folder: Path, stored_as: str = "fp16", **values) -> FeatureCache:
    found = FeatureFolder(folder, model.config.audio_config.d_model, stored_as)
    executor = Executor(model, **{"max_tokens_per_pack": 1000, "pad_token_id": 0} | values)
    return FeatureCache(executor, FeatureReader(found, model.config.frames, b""), FeatureWriter(found))


def samples_of(model, clips: list[list[int]] = CLIPS, bad=None) -> list[Sample]:
    """A clip's key is its length and the seed of its noise."""
    samples = []
    for seed, lengths in enumerate(clips):
        sample = make_sample(model, [3] * len(lengths) + [4], lengths, seed=10 * seed)
        for n, length in enumerate(lengths):  # each of one window
            key = repr((length, 10 * seed + n)).encode().ljust(32)
            sample.uncached.append(Uncached(MissingClip(key, bad), f"clip {seed} {n}", n, 1, length, []))
        samples.append(sample)
    return samples


def packed(model, samples, **values) -> Batch:
    return packed_batch(samples, model.config.frames, VOCABULARY - 1, **values)


@torch.no_grad()
def losses(model, samples, batch: Batch | None = None) -> torch.Tensor:
    batch = batch or packed(model, samples)
    return by_sample(batch, run_pack(model, batch, 0.0).tokens.losses)[: len(samples)]


def values_of(samples) -> list[np.ndarray]:
    found = []
    for window in (window for sample in samples for window in sample.windows):
        values = np.empty((window.num_frames, window.width), np.float16 if window.stored_as == "fp16" else np.int8)
        window.rows.copy_to(values, np.empty(window.num_frames, np.float16) if window.stored_as == "int8" else None)
        found.append(values)
    return found


def test_fp16_keeps_what_bf16_has_and_int8_half_a_step_of_its_scale():
    torch.manual_seed(0)
    frames = torch.randn(50, 64).bfloat16() * torch.logspace(-2, 2, 50)[:, None].bfloat16()
    values, scales = rounded(frames, "fp16")
    assert scales is None and torch.equal(torch.from_numpy(values).bfloat16(), frames)
    values, scales = rounded(frames, "int8")
    found = values.astype(np.float32) * scales.astype(np.float32)[:, None]
    error = np.abs(found - frames.float().numpy())
    assert (error <= (0.5 + 127 * 2**-11) * scales.astype(np.float32)[:, None] * 1.001).all() and error.max() > 0


def test_what_is_not_finite_or_zero_stays_so():
    frames = torch.ones(4, 8)
    frames[0, 3], frames[1, 2], frames[2] = torch.nan, torch.inf, 0.0
    values, _ = rounded(frames, "fp16")
    assert np.isfinite(values).all(1).tolist() == [False, False, True, True]
    values, scales = rounded(frames, "int8")
    assert np.isfinite(scales).tolist() == [False, False, True, True] and not values[2].any()


@formats
def test_a_pack_of_cached_features_has_the_losses_of_its_waveforms(model, tmp_path, stored_as):
    samples = samples_of(model)
    expected = losses(model, samples)
    cache = cache_of(model, tmp_path, stored_as)
    assert cache.complete(samples) == []
    assert all(isinstance(window, EncodedWindow) for sample in samples for window in sample.windows)
    model.model.audio_tower = None  # nothing of it is needed
    found = losses(model, samples)
    assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE[stored_as]) and not torch.equal(found, expected)
    shape = pack_shape(samples, model.config.frames)
    assert (shape.mel_frames, shape.max_window, shape.waveform_samples) == (0, 0, 0) and shape.windows == 4
    larger = replace(
        shape, tokens=shape.tokens + 9, segments=shape.segments + 2, supervised=shape.supervised + 3,
        audio_tokens=shape.audio_tokens + 5, encoder_frames=shape.encoder_frames + 11, windows=shape.windows + 1,
    )  # fmt: skip
    batch = packed(model, samples, shape=larger)
    assert batch.audio.frames.shape[0] == larger.encoder_frames and not batch.audio.frames[-11:].any()
    assert torch.allclose(losses(model, samples, batch), found, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="does not fit"):
        packed(model, samples, shape=replace(shape, encoder_frames=shape.encoder_frames - 1))
    rows = padded_batch(samples, model.config.frames, VOCABULARY - 1, 0)
    assert torch.allclose(losses(model, samples, rows), found, rtol=0, atol=1e-5)


@formats
def test_first_use_and_later_ones_have_the_same_bits(model, tmp_path, stored_as):
    cache = cache_of(model, tmp_path, stored_as)
    first, again = samples_of(model), samples_of(model)
    cache.complete(first)
    model.model.audio_tower = None
    cache.complete(again)  # the cache has them since these were read
    assert [a.tobytes() for a in values_of(first)] == [b.tobytes() for b in values_of(again)]
    assert torch.equal(losses(model, first), losses(model, again))


def test_a_clip_is_encoded_once_for_all_samples_of_a_step(model, tmp_path):
    cache = cache_of(model, tmp_path)
    samples = samples_of(model)
    samples += copy.deepcopy(samples)
    cache.complete(samples)
    assert len(list(tmp_path.glob("*.features"))) == 1
    cache.reader.found.refresh()
    assert len(cache.reader.found._entries) == 4
    values = values_of(samples)
    assert [a.tobytes() for a in values[:4]] == [b.tobytes() for b in values[4:]]


def test_features_that_are_not_finite_are_used_and_not_kept(model, tmp_path):
    cache = cache_of(model, tmp_path)
    samples = samples_of(model, [[5000], [800]])
    samples[0].windows[0][:] = np.nan
    cache.complete(samples)
    assert torch.isfinite(losses(model, samples)).tolist() == [False, True]
    assert len(cache.reader.found._entries) == 1


def test_a_pack_that_does_not_fit_is_encoded_in_smaller_ones(model, tmp_path, monkeypatch):
    cache, honest, sizes = cache_of(model, tmp_path), model.model.encode_audio, []

    def encode(waveforms, lengths):
        sizes.append(len(lengths))
        if len(lengths) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(waveforms, lengths)

    monkeypatch.setattr(model.model, "encode_audio", encode)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    samples = samples_of(model, [[800], [5000], [16_001], [7000]])
    events = cache.complete(samples)
    assert events and {event.kind for event in events} == {"out_of_memory"}
    assert sizes[0] == 4 and sizes[-4:] == [1, 1, 1, 1] and torch.isfinite(losses(model, samples)).all()


def test_memory_that_graphs_held_is_freed_before_packs_are_halved(model, tmp_path, monkeypatch):
    cache, honest, passes = cache_of(model, tmp_path), model.model.encode_audio, {"recorded": None}
    cache.executor._regions = SimpleNamespace(graphs=SimpleNamespace(passes=passes, forget=passes.clear))
    sizes = []

    def encode(waveforms, lengths):
        sizes.append(len(lengths))
        if passes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(waveforms, lengths)

    monkeypatch.setattr(model.model, "encode_audio", encode)
    assert cache.complete(samples_of(model)) == []
    assert sizes == [4, 4] and cache.executor.max_tokens_per_pack == 1000


def test_a_stop_between_two_packs_leaves_the_samples_as_they_were(model, tmp_path):
    cache, samples = cache_of(model, tmp_path, max_tokens_per_pack=1), samples_of(model)
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    cache.executor.before_pack = stop
    with pytest.raises(KeyboardInterrupt):
        cache.complete(samples)
    assert [len(sample.uncached) for sample in samples] == [2, 1, 0, 1]
    assert all(isinstance(window, np.ndarray) for sample in samples for window in sample.windows)


def test_waveforms_and_features_do_not_share_a_pack(model, tmp_path):
    samples = samples_of(model)
    cache_of(model, tmp_path).complete(samples[:1])
    with pytest.raises(ValueError, match="2 of 4 windows are encoded"):
        packed(model, samples)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@formats
def test_a_step_on_cached_features_waits_for_no_gpu(model, tmp_path, stored_as):
    model.model.multi_modal_projector.requires_grad_(True)
    samples = samples_of(model)
    expected = float(losses(model, samples).sum())
    cache = cache_of(model.cuda(), tmp_path, stored_as)
    cache.complete(samples)
    model.train()
    cache.executor.forward_backward(samples, 6)  # makes kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = cache.executor.forward_backward(samples, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(step.loss) == pytest.approx(expected, rel=1e-2)
