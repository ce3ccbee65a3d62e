"""Dialogues to the rows of each optimizer step, read ahead by processes that may die or hang.

A bad dialogue becomes a named rejection, never an exception.

Not torch's DataLoader: it raises the death of a worker wherever the training process stands, also in the middle of an
optimizer step or a save, and without its signal handler a worker killed in the middle of a message blocks the reader
for ever. Here each worker has its own pipe, which nobody else can write into: when it closes, the worker is dead.
"""

import multiprocessing
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from qwhisper.data.dialogue import Dialogue
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.rows import Sample
from qwhisper.data.sampler import GlobalBatches
from qwhisper.errors import DataError

MAX_DEATHS = 3  # of workers in a row while the same samples are awaited
CHUNK = 16  # dialogues that a worker reads for an evaluation before it answers
AHEAD = 2  # tasks that a worker has been given: the one that it does, and the next
# In which a worker has to answer. Decoding takes seconds: one that is silent for so long hangs, in a decoder, on a
# network drive, or at a lock that some other thread held while it was forked.
ANSWER_SECONDS = 900.0
STOP_SECONDS = 1.0  # a killed process that is not gone by then hangs in the kernel, on a dead disk: left to itself
FORK = multiprocessing.get_context("fork")  # what is worked on is inherited, not pickled
Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerDied(Exception):
    """A worker ended before it had answered, hangs, or was never there.

    how: "signal 9", "exit code 1", "no answer in 900 s" or "no process could be started (…)".
    """

    def __init__(self, how: str):
        super().__init__(how)
        self.how = how


def work_ahead(
    work: Callable[[Task], Result], tasks: Iterator[Task], num_workers: int
) -> Iterator[tuple[Task, Result]]:
    """Each task and what `work` makes of it, in the order of the tasks; without workers in this process.

    Raises WorkerDied, and whatever `work` raises.
    """
    if not num_workers:
        for task in tasks:
            yield task, work(task)
        return
    workers: list[_Worker] = []
    try:
        for _ in range(num_workers):
            workers.append(_Worker(work, workers))
        given: deque[tuple[Task, _Worker]] = deque()
        for worker, task in zip(cycle(workers), islice(tasks, AHEAD * num_workers), strict=False):
            worker.give(task)
            given.append((task, worker))
        while given:
            task, worker = given.popleft()
            result = worker.answer()
            for following in islice(tasks, 1):
                worker.give(following)
                given.append((following, worker))
            yield task, result
    finally:
        _stop(workers)


def how_it_dies(work: Callable[[Task], Any], task: Task) -> str | None:
    """Run `work(task)` in a throwaway process. Return how it died or hung; None if it finished (even by raising) or
    could not start.
    """
    try:
        worker = _Worker(work, [])
    except WorkerDied:
        return None
    try:
        worker.give(task)
        worker.answer()
    except WorkerDied as death:
        return death.how
    except Exception:
        return None
    finally:
        _stop([worker])
    return None


class _Worker:
    def __init__(self, work: Callable[[Any], Any], earlier: Sequence["_Worker"]):
        try:
            self.pipe, its_end = FORK.Pipe()
            not_its = [self.pipe, *(worker.pipe for worker in earlier)]
            self.process = FORK.Process(target=serve, args=(its_end, work, not_its), daemon=True)
            self.process.start()
        except OSError as error:  # no memory, or a limit of processes or open files
            raise WorkerDied(f"no process could be started ({error.strerror})") from None
        its_end.close()  # before the next worker is forked, which would keep it open

    def give(self, task: Any) -> None:
        with suppress(OSError):  # dead: found out where its answer is missed
            self.pipe.send(task)

    def answer(self) -> Any:
        try:
            if not self.pipe.poll(ANSWER_SECONDS):
                raise WorkerDied(f"no answer in {ANSWER_SECONDS:.0f} s")
            result, error = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            raise WorkerDied(f"signal {-code}" if code < 0 else f"exit code {code}") from None
        if error is not None:
            raise error
        return result


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()  # it holds nothing that could be left half done, and may hang in a decoder
    for worker in workers:
        worker.process.join(STOP_SECONDS)
        worker.pipe.close()


def serve(pipe: Connection, work: Callable[[Any], Any], not_its: Sequence[Connection]) -> None:
    """A worker's life. It ends with the training process, whose end closes the other end of the pipe."""
    for other in not_its:
        other.close()
    # Ctrl-C and a closed terminal signal all processes; the trainer decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # its other threads were not forked
    with suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            try:
                answer: tuple[Any, Exception | None] = (work(task), None)
            except Exception as error:
                answer = (None, _portable(error))
            pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or that alone where the error can't cross a pipe."""
    trace = f"in a data worker:\n{traceback.format_exc()}"
    error.add_note(trace)
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(trace)


@dataclass
class Rejection:
    """A dialogue that can't be trained on, and why."""

    id: str
    source: str
    reason: str


class EncodedDialogues:
    """Item i: the rows of dialogue i, or its rejection."""

    def __init__(self, dialogues: Sequence[Dialogue], encoder: DialogueEncoder):
        self.dialogues = dialogues
        self.encoder = encoder
        self.killers: dict[int, Rejection] = {}

    def __len__(self) -> int:
        return len(self.dialogues)

    def __getitem__(self, index: int) -> list[Any] | Rejection:
        try:
            return self.rows(index)
        except DataError as error:
            dialogue = self.dialogues[index]
            return Rejection(dialogue.id, dialogue.source, str(error))

    def rows(self, index: int) -> list[Any]:
        """What is made of dialogue i: its samples; a subclass may make others. Raises DataError."""
        return self.encoder.encode_rows(self.dialogues[index])

    def items(self, indices: Iterable[int]) -> list[list[Any] | Rejection]:
        return [self.killers[index] if index in self.killers else self[index] for index in indices]

    def reject_killers(self, indices: Iterable[int]) -> list[str]:
        """Encode each in a throwaway process; reject from now on those that kill or hang it. Return their ids."""
        found = []
        for index in indices:
            if index not in self.killers and (how := how_it_dies(self.__getitem__, index)):
                dialogue = self.dialogues[index]
                reason = f"{dialogue.source}: a process that reads it is lost ({how}); convert it, or leave it out"
                self.killers[index] = Rejection(dialogue.id, dialogue.source, reason)
                found.append(dialogue.id)
        return found


@dataclass
class WorkerDeath:
    """A process that reads ahead died or hung. how: as in WorkerDied; samples: ids of those that it died of."""

    how: str
    samples: list[str]


@dataclass
class StepSamples:
    """What one optimizer step is given; epoch and offset are the sampler's position after it.

    deaths: of workers while these samples were awaited.
    """

    samples: list[Sample]
    rejections: list[Rejection]
    epoch: int
    offset: int
    deaths: list[WorkerDeath] = field(default_factory=list)


def encode_all(dataset: EncodedDialogues, num_workers: int = 0) -> tuple[list[Any], list[Rejection]]:
    """Every dialogue's rows at once."""
    return sort_items(chain.from_iterable(read_in_order(dataset, num_workers)))


def read_in_order(
    dataset: EncodedDialogues, num_workers: int = 0, *, chunk: int = CHUNK
) -> Iterator[list[list[Any] | Rejection]]:
    """The items, in chunks that a worker reads at a time; read as they are asked for, and with workers a few chunks
    ahead. One that kills its worker is a rejection. Raises DataError if workers die in a row, whatever they read.
    """
    chunks = [range(first, min(first + chunk, len(dataset))) for first in range(0, len(dataset), chunk)]
    done = deaths = 0
    while done < len(chunks):
        try:
            for _, found in work_ahead(dataset.items, iter(chunks[done:]), num_workers):
                done, deaths = done + 1, 0
                yield found
        except WorkerDied as death:
            dataset.reject_killers(chunks[done])
            deaths += 1
            if deaths == MAX_DEATHS:
                raise DataError(_always_dying(death, num_workers)) from None


def _always_dying(death: WorkerDied, num_workers: int) -> str:
    return (
        f"{MAX_DEATHS} times in a row a process that reads audio was lost ({death.how}), and no sample was found to be "
        f"at fault: too little memory or too many processes, perhaps; lower --dataloader_num_workers {num_workers}"
    )


def sort_items(items: Iterable[list[Any] | Rejection]) -> tuple[list[Any], list[Rejection]]:
    """All rows, and all rejections."""
    rows: list[Any] = []
    rejections: list[Rejection] = []
    for item in items:
        if isinstance(item, Rejection):
            rejections.append(item)
        else:
            rows += item
    return rows, rejections


def step_samples(
    dataset: EncodedDialogues, *, samples_per_step: int, seed: int, epoch: int, offset: int, num_workers: int
) -> Iterator[StepSamples]:
    """Endless, from a position in the epochs on.

    The order depends on the seed alone, not on the workers or on where it was resumed. Where a worker dies, all are
    started again at the position that was reached, without the samples that kill whoever reads them. Raises DataError
    where they die in a row though each sample can be read.
    """
    batches = GlobalBatches(num_samples=len(dataset), batch_size=samples_per_step, seed=seed)
    deaths: list[WorkerDeath] = []
    while True:
        try:
            tasks = batches.starting_at(epoch, offset)
            for batch, items in work_ahead(lambda batch: dataset.items(batch.indices), tasks, num_workers):
                samples, rejections = sort_items(items)
                yield StepSamples(samples, rejections, batch.epoch, batch.offset, deaths)
                epoch, offset, deaths = batch.epoch, batch.offset, []
        except WorkerDied as death:
            awaited = next(batches.starting_at(epoch, offset))
            deaths.append(WorkerDeath(death.how, dataset.reject_killers(awaited.indices)))
            if len(deaths) == MAX_DEATHS:
                raise DataError(_always_dying(death, num_workers)) from None
