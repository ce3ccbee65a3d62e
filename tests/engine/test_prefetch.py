"""Batches that were built before they are needed equal, bit for bit, those that are built when they are."""

import dataclasses
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwhisper.engine import prefetch
from qwhisper.engine.executor import Executor
from qwhisper.engine.prefetch import HostBatches
from qwhisper.model.audio_layout import pinned
from qwhisper.train import run as run_module
from tests.model.parts import make_sample, with_teacher
from tests.small import small_model
from tests.train.helpers import checkpoint_tensors, same_bits


def parts(value: Any, name: str = "batch") -> dict[str, Any]:
    """Every tensor and plain value of a dataclass, by its path."""
    if not dataclasses.is_dataclass(value):
        return {name: value}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        found |= parts(getattr(value, field.name), f"{name}.{field.name}")
    return found


def assert_equal(a: Any, b: Any) -> None:
    first, second = parts(a), parts(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        assert same, name


@pytest.fixture
def prepared() -> SimpleNamespace:
    """An executor in training, samples of which some have a teacher, and their packs, of which each has a batch."""
    model = small_model().train()
    executor = Executor(model, max_tokens_per_pack=40, pad_token_id=0, distill_weight=0.5)
    samples = [make_sample(model, [4] * (1 + n) + [3], [800, 5000][:n], seed=n) for n in (0, 1, 2, 1, 0, 2)]
    samples[1] = with_teacher(samples[1], 5)
    packs = executor.packs(samples)
    assert len(packs) > 1
    built = threading.Thread(target=executor.prepare, args=[samples])
    built.start()
    built.join()
    return SimpleNamespace(model=model, executor=executor, samples=samples, packs=packs)


def made_again(executor: Executor) -> list:
    """The packs that are built from now on."""
    seen, make = [], executor._host_batch
    executor._host_batch = lambda pack, **options: seen.append(pack) or make(pack, **options)
    return seen


def test_a_prepared_batch_is_taken_once_and_equals_one_that_is_made_when_needed(prepared):
    executor, made = prepared.executor, made_again(prepared.executor)
    ahead = [executor.batch(pack) for pack in prepared.packs]
    assert made == [] and any(batch.teacher is not None for batch in ahead)
    for pack, batch in zip(prepared.packs, ahead, strict=True):
        assert_equal(executor.batch(pack), batch)
    assert made == prepared.packs


def test_an_evaluation_and_other_packs_take_none(prepared):
    executor, made = prepared.executor, made_again(prepared.executor)
    with executor.evaluation_mode():
        assert executor.batch(prepared.packs[0]).teacher is None
    halves = [pack[:1] for pack in prepared.packs if len(pack) > 1]
    for half in halves:
        executor.batch(half)
    assert made == [prepared.packs[0], *halves]


def test_a_batch_that_was_made_in_another_way_is_not_taken(prepared):
    batches, pack = HostBatches(torch.device("cpu")), prepared.packs[0]
    batches.prepare([pack], lambda pack: "rounded")
    assert batches.take(pack, lambda pack: "exact") == "exact"


def test_no_more_than_two_steps_are_kept():
    batches, steps = HostBatches(torch.device("cpu")), [[[SimpleNamespace()]] for _ in range(prefetch.STEPS + 1)]

    def made(pack) -> str:
        return "made now" if ready else "prepared"

    ready = False
    for packs in steps:
        batches.prepare(packs, made)
    ready = True
    assert [batches.take(pack, made) for (pack,) in steps] == ["made now", "prepared", "prepared"]


def test_pinning_reaches_every_tensor_and_changes_none(prepared, monkeypatch):
    batch = prepared.executor._training_batch(prepared.packs[0])
    tensors, copies = [value for value in parts(batch).values() if isinstance(value, Tensor)], []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: copies.append(tensor.clone()) or copies[-1])
    assert_equal(pinned(batch), batch)
    assert len(copies) == len(tensors) > 10


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA error: out of memory")], ids=["enough", "too little"])
def test_batches_for_a_gpu_are_pinned_unless_there_is_too_little_of_that_memory(prepared, monkeypatch, error):
    asked = []

    def pin(batch):
        asked.append(batch)
        if error:
            raise error
        return "pinned"

    monkeypatch.setattr(prefetch, "pinned", pin)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    batches, (first, second, *_) = HostBatches(torch.device("cuda")), prepared.packs
    batches.prepare([first, second], prepared.executor._training_batch)
    taken = [batches.take(pack, prepared.executor._training_batch) for pack in (first, second)]
    if error is None:
        assert taken == ["pinned", "pinned"]
    else:
        assert len(asked) == 1  # it is not tried again
        for pack, batch in zip((first, second), taken, strict=True):
            assert_equal(batch, prepared.executor._training_batch(pack))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pinned_batch_reaches_the_gpu_whole_although_it_is_dropped_at_once(prepared):
    device = torch.device("cuda")
    batches, make = HostBatches(device), prepared.executor._training_batch
    for _ in range(20):  # so that freed memory is used again
        batches.prepare(prepared.packs, make)
        moved = [batches.take(pack, make).to(device) for pack in prepared.packs]
        for pack, batch in zip(prepared.packs, moved, strict=True):
            assert_equal(batch.to("cpu"), make(pack))


def test_a_training_with_workers_takes_the_prepared_batches_and_ends_with_the_same_weights(
    arguments, tmp_path, monkeypatch
):
    counts = {"prepared": 0, "made": 0}

    class Counted(HostBatches):
        def take(self, pack, make):
            def made(pack):
                counts["made"] += 1
                return make(pack)

            before = counts["made"]
            batch = super().take(pack, make)
            counts["prepared"] += counts["made"] == before
            return batch

    values = {"max_steps": 4, "save_steps": 4, "max_tokens_per_pack": 100, "dtype": "fp32"}
    whole = arguments(output_dir=str(tmp_path / "whole"), **values)
    assert run_module.main(whole) == 0
    monkeypatch.setattr("qwhisper.engine.executor.HostBatches", Counted)
    ahead = arguments(output_dir=str(tmp_path / "ahead"), dataloader_num_workers=1, **values)
    assert run_module.main(ahead) == 0
    assert counts["prepared"] >= 4
    first, second = (checkpoint_tensors(tmp_path / name / "checkpoint-4") for name in ("whole", "ahead"))
    assert first and same_bits(first, second) == []
