"""Worker processes: the same results in the same order however many there are, and none of the trainer's ballast."""

import errno
import itertools
import os
import sys
import threading
from functools import partial

import pytest

from qwhisper.data import processes, worker
from qwhisper.data.clips import read_own_audio
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.loader import DialogueReader
from qwhisper.data.processes import WorkerDied, how_it_dies, work_ahead
from qwhisper.errors import DataError
from tests.data.conftest import CHATML, byte_tokenizer, dialogue_of, reply, user
from tests.test_faults.kill_shim import fail
from tests.workers import (
    bytes_of,
    exits,
    fails_at_3,
    fails_oddly,
    hangs_at_1,
    length,
    read_and_look,
    settings,
    signals_itself,
    square,
    stops_in_an_answer_at_1,
    worker_pids,
)


@pytest.mark.parametrize(
    ("num_workers", "count"), [(0, 0), (0, 3), (2, 0), pytest.param(2, 1, marks=pytest.mark.slow), (2, 7)]
)
def test_results_come_in_the_order_of_the_tasks(num_workers, count):
    results = list(work_ahead(square, iter(range(count)), num_workers))
    assert results == [(n, n * n) for n in range(count)] and worker_pids() == []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_no_more_is_asked_for_than_two_tasks_a_worker_ahead(num_workers):
    taken = []
    tasks = (taken.append(n) or n for n in range(100))
    results = work_ahead(square, tasks, num_workers)
    next(results)
    assert len(taken) == 2 * num_workers + 1 and len(worker_pids()) == num_workers
    results.close()
    assert worker_pids() == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_crosses_with_its_type_and_message(num_workers):
    results = work_ahead(fails_at_3, itertools.count(), num_workers)
    assert [result for _, result in itertools.islice(results, 3)] == [0, 1, 2]
    with pytest.raises(DataError, match="line 3 is empty") as raised:
        next(results)
    if num_workers:
        assert "in fails_at_3" in raised.value.__notes__[0]


def test_an_error_that_cannot_cross_is_told():
    with pytest.raises(RuntimeError, match="the reason"):
        list(work_ahead(fails_oddly, iter([1]), 1))


def test_large_results_and_large_tasks_cross_whole():
    assert all(result == bytes([n]) * 5_000_000 for n, result in work_ahead(bytes_of, iter(range(4)), 1))
    tasks = [bytes(5_000_000)] * 4  # more than a socket holds, given before the first answer is taken
    assert [result for _, result in work_ahead(length, iter(tasks), 1)] == [5_000_000] * 4


def test_a_worker_knows_neither_torch_nor_transformers(frames, recordings):
    encoder = DialogueEncoder(byte_tokenizer(CHATML), frames, audio_token_id=300)
    clip = read_own_audio(str(recordings[1]), "clip")
    dialogue = dialogue_of(user(clip, "hi"), reply("yes"))
    names = ["torch", "transformers", "huggingface_hub", "multiprocessing", "tokenizers", "jinja2", "soundfile"]
    assert "torch" in sys.modules and "transformers" in sys.modules
    ((_, (ids, loaded)),) = work_ahead(partial(read_and_look, DialogueReader(encoder)), iter([(dialogue, names)]), 1)
    assert ids == encoder.encode(dialogue).input_ids.tolist()
    assert loaded == ["tokenizers", "jinja2", "soundfile"]


def test_a_worker_finds_modules_where_the_trainer_does(tmp_path, monkeypatch):
    (tmp_path / "vendored: here").mkdir()
    (tmp_path / "vendored: here/only_there.py").write_text("def double(n):\n    return 2 * n\n")
    monkeypatch.syspath_prepend(tmp_path / "vendored: here")
    import only_there

    assert list(work_ahead(only_there.double, iter([4]), 1)) == [(4, 8)]
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    ((_, found),) = work_ahead(settings, iter([None]), 1)
    assert found["path"] == [os.path.abspath(place) for place in sys.path] and found["threads"] == 1


def test_a_death_is_told_with_its_signal():
    results = work_ahead(signals_itself, iter([0, 9, 0]), 1)
    assert next(results) == (0, 0)
    with pytest.raises(WorkerDied, match="signal 9"):
        next(results)
    assert how_it_dies(signals_itself, 9) == "signal 9" and how_it_dies(signals_itself, 0) is None
    assert how_it_dies(exits, 3) == "exit code 3"
    assert how_it_dies(fails_at_3, 3) is None


@pytest.mark.parametrize("work", [hangs_at_1, stops_in_an_answer_at_1], ids=["silent", "in the middle of an answer"])
def test_a_worker_that_does_not_answer_is_given_up(monkeypatch, work):
    results = work_ahead(work, iter([0, 1, 0]), 1)
    assert next(results)[0] == 0
    monkeypatch.setattr(processes, "ANSWER_SECONDS", 1.0)  # it has started by now
    with pytest.raises(WorkerDied, match="no answer in 1 s"):
        next(results)
    assert worker_pids() == []


class Ended(BaseException):
    pass


def test_what_is_read_without_a_wait_is_polled_too():
    polls = []
    assert list(work_ahead(square, iter(range(20)), 1, lambda: polls.append(1))) == [(n, n * n) for n in range(20)]
    assert len(polls) >= 20


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_wait_is_polled_and_ends_with_what_the_poll_raises(monkeypatch, num_workers):
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    polls = itertools.count()

    def poll():
        if next(polls) == 3:
            raise Ended

    work = hangs_at_1 if num_workers else lambda n: threading.Event().wait()
    with pytest.raises(Ended):
        next(work_ahead(work, iter([1]), num_workers, poll))
    assert worker_pids() == []


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_a_process_that_cannot_be_started_is_a_death_and_no_fault_of_the_task(monkeypatch, number):
    monkeypatch.setattr(processes.subprocess, "Popen", lambda *_, **__: fail(number)())
    with pytest.raises(WorkerDied, match=f"no process could be started .{os.strerror(number)}."):
        next(work_ahead(square, iter([0]), 2))
    assert how_it_dies(square, 0) is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_thread_that_cannot_be_started_is_a_death_and_leaves_no_process(monkeypatch, num_workers):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(WorkerDied, match="no thread could be started"):
        next(work_ahead(square, iter([0]), num_workers, lambda: None))
    assert how_it_dies(square, 0) is None and worker_pids() == []
