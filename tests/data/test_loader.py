"""Processes that work ahead: the same results in the same order, however many there are."""

import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from qwhisper.data import loader as workers
from qwhisper.data.loader import EncodedDialogues, WorkerDied, how_it_dies, step_samples, work_ahead
from qwhisper.errors import DataError
from qwhisper.train.run import main
from tests.test_faults.inject import outcome_of
from tests.test_faults.kill_shim import fail
from tests.test_faults.lives import At
from tests.train.helpers import checkpoint_tensors, same_bits
from tests.train.test_resume import StopAfter


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_results_come_in_the_order_of_the_tasks(num_workers, count):
    results = list(work_ahead(lambda n: n * n, iter(range(count)), num_workers))
    assert results == [(n, n * n) for n in range(count)]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_no_more_is_asked_for_than_two_tasks_a_worker_ahead(num_workers):
    taken = []
    tasks = (taken.append(n) or n for n in range(100))
    results = work_ahead(lambda n: n, tasks, num_workers)
    next(results)
    assert len(taken) == 2 * num_workers + 1
    results.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_crosses_with_its_type_and_message(num_workers):
    def work(n):
        if n == 3:
            raise DataError("line 3 is empty")
        return n

    results = work_ahead(work, itertools.count(), num_workers)
    assert [result for _, result in itertools.islice(results, 3)] == [0, 1, 2]
    with pytest.raises(DataError, match="line 3 is empty"):
        next(results)


def test_an_error_that_cannot_cross_is_told():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    def work(n):
        raise Odd("the reason", 2)

    with pytest.raises(RuntimeError, match="the reason"):
        list(work_ahead(work, iter([1]), 1))


def test_large_results_cross_whole():
    results = work_ahead(lambda n: bytes([n]) * 5_000_000, iter(range(4)), 2)
    assert all(result == bytes([n]) * 5_000_000 for n, result in results)


def test_a_death_is_told_with_its_signal():
    def work(n):
        return os.kill(os.getpid(), n) if n else n

    results = work_ahead(work, iter([0, 9, 0]), 1)
    assert next(results) == (0, 0)
    with pytest.raises(WorkerDied, match="signal 9"):
        next(results)
    assert how_it_dies(work, 9) == "signal 9" and how_it_dies(work, 0) is None
    assert how_it_dies(lambda n: os._exit(3), 0) == "exit code 3"
    assert how_it_dies(lambda n: 1 / n, 0) is None


def test_a_worker_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 1.0)
    results = work_ahead(lambda n: signal.pause() if n else n, iter([0, 1, 0]), 1)
    assert next(results) == (0, 0)
    with pytest.raises(WorkerDied, match="no answer in 1 s"):
        next(results)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_a_process_that_cannot_be_started_is_a_death_and_no_fault_of_the_task(monkeypatch, number):
    monkeypatch.setattr(os, "fork", fail(number))
    with pytest.raises(WorkerDied, match=f"no process could be started .{os.strerror(number)}."):
        next(work_ahead(lambda n: n, iter([0]), 2))
    assert how_it_dies(lambda n: n, 0) is None


def test_a_run_that_can_start_no_process_again_ends_with_advice_and_quarantines_nothing(arguments, monkeypatch):
    args = arguments(dataloader_num_workers=2, max_steps=9)

    def killed_by_the_system():
        monkeypatch.setattr(os, "fork", fail(errno.EAGAIN))
        for process in multiprocessing.active_children():
            process.kill()

    outcome = outcome_of(args, [At(3, killed_by_the_system)])
    assert outcome.code == 3, outcome.message
    assert "no process could be started" in outcome.message and "--dataloader_num_workers 2" in outcome.message
    assert not (Path(args.output_dir) / "quarantine.jsonl").exists()


@pytest.mark.parametrize("position", [(0, 0), (0, 4), (1, 8)])
def test_same_samples_from_any_position_with_any_number_of_workers(position):
    class Numbers(EncodedDialogues):
        def __init__(self):
            super().__init__(list(range(12)), None)

        def __getitem__(self, index):
            return [index]

    epoch, offset = position
    taken = [
        [
            (step.samples, step.epoch, step.offset)
            for step in itertools.islice(
                step_samples(
                    Numbers(), samples_per_step=4, seed=1, epoch=epoch, offset=offset, num_workers=num_workers
                ),
                7,
            )
        ]
        for num_workers in (0, 2, 4)
    ]
    assert taken[0] == taken[1] == taken[2]


def test_resume_is_bit_exact_with_four_workers_and_keeps_the_pack_size(arguments, tmp_path):
    values = {"lora_dropout": 0.2, "max_steps": 6, "save_steps": 100, "max_tokens_per_pack": "70"}
    whole = arguments(output_dir=str(tmp_path / "whole"), **values)
    assert main(whole) == 0
    parts = arguments(output_dir=str(tmp_path / "parts"), dataloader_num_workers=4, **values)
    assert main(parts, [StopAfter(2)]) == 0
    assert main(dataclasses.replace(parts, resume_from_checkpoint="latest")) == 0
    ends = [checkpoint_tensors(tmp_path / name / "checkpoint-6") for name in ("whole", "parts")]
    assert same_bits(*ends) == []
    states = [json.loads((tmp_path / name / "checkpoint-6/state.json").read_text()) for name in ("whole", "parts")]
    for state in states:
        del state["probe"]  # seconds
    assert states[0] == states[1] and states[0]["max_tokens_per_pack"] == 70
