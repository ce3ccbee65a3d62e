"""Dialogues to the rows of each optimizer step, read ahead by processes that may die or hang.

A bad dialogue becomes a named rejection, never an exception.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.processes import Poll, WorkerDied, how_it_dies, nothing, work_ahead
from qwhisper.data.rows import Sample
from qwhisper.data.source import Position, Source, StepDialogues
from qwhisper.errors import DataError

MAX_DEATHS = 3  # of workers in a row while the same samples are awaited
CHUNK = 16  # dialogues that a worker reads for an evaluation before it answers


class Readable(Protocol):
    """A dialogue, or something made from one."""

    @property
    def id(self) -> str: ...

    @property
    def source(self) -> str: ...


@dataclass
class Rejection:
    """A dialogue that can't be trained on, and why."""

    id: str
    source: str
    reason: str


@dataclass
class DialogueReader:
    """Reads dialogues, in this process or in a worker, which gets a copy of this object.

    killers: the rejections, by id, of dialogues that kill or hang their reader; they are not read again. rows: makes a
    dialogue's rows (samples, or others); importable by its module's name; raises DataError.
    """

    encoder: DialogueEncoder
    killers: dict[str, Rejection] = field(default_factory=dict)
    rows: Callable[[DialogueEncoder, Any], list[Any]] = DialogueEncoder.encode_rows

    def read(self, dialogue: Readable) -> list[Any] | Rejection:
        """The rows of a dialogue, or its rejection."""
        try:
            return self.rows(self.encoder, dialogue)
        except DataError as error:
            return Rejection(dialogue.id, dialogue.source, str(error))

    def read_all(self, dialogues: Sequence[Readable]) -> list[list[Any] | Rejection]:
        return [self.killers.get(dialogue.id) or self.read(dialogue) for dialogue in dialogues]

    def read_step(self, step: StepDialogues) -> list[list[Any] | Rejection]:
        return self.read_all(step.dialogues)

    def reject_killers(self, dialogues: Iterable[Readable], poll: Poll = nothing) -> list[str]:
        """Read each in a throwaway process; reject from now on those that kill or hang it. Return their ids."""
        found = []
        for dialogue in dialogues:
            if dialogue.id not in self.killers and (how := how_it_dies(self.read, dialogue, poll)):
                self.killers[dialogue.id] = Rejection(dialogue.id, dialogue.source, _lost(dialogue, how))
                found.append(dialogue.id)
        return found


def _lost(dialogue: Readable, how: str) -> str:
    return f"{dialogue.source}: a process that reads it is lost ({how}); convert it, or leave it out"


@dataclass
class WorkerDeath:
    """A process that reads ahead died or hung. how: as in WorkerDied; samples: ids of the dialogues that caused it."""

    how: str
    samples: list[str]


@dataclass
class StepSamples:
    """The samples of one optimizer step; `position` is the source's position after it.

    deaths: of workers while these samples were read.
    """

    samples: list[Sample]
    rejections: list[Rejection]
    position: Position = None
    deaths: list[WorkerDeath] = field(default_factory=list)


def encode_all(
    dialogues: Sequence[Readable], encoder: DialogueEncoder, num_workers: int = 0
) -> tuple[list[Sample], list[Rejection]]:
    """All dialogues' rows, and all rejections."""
    return sort_items(chain.from_iterable(read_in_order(dialogues, encoder, num_workers)))


def read_in_order(
    dialogues: Sequence[Readable],
    encoder: DialogueEncoder,
    num_workers: int = 0,
    *,
    rows: Callable[[DialogueEncoder, Any], list[Any]] = DialogueEncoder.encode_rows,
    chunk: int = CHUNK,
    poll: Poll = nothing,
) -> Generator[list[list[Any] | Rejection]]:
    """Yield the rows or the rejection of each dialogue, in chunks that a worker reads at a time; read on demand, and
    with workers a few chunks ahead. rows: as DialogueReader's.

    With workers, a dialogue that kills its reader becomes a rejection. Raises DataError if workers die repeatedly
    although each dialogue can be read, and what `poll` raises in a wait.
    """
    reader = DialogueReader(encoder, rows=rows)
    chunks = [dialogues[first : first + chunk] for first in range(0, len(dialogues), chunk)]
    done = deaths = 0
    while done < len(chunks):
        try:
            for _, found in work_ahead(reader.read_all, iter(chunks[done:]), num_workers, poll):
                done, deaths = done + 1, 0
                yield found
        except WorkerDied as death:
            reader.reject_killers(chunks[done], poll)
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
    source: Source, encoder: DialogueEncoder, *, position: Position = None, num_workers: int = 0, poll: Poll = nothing
) -> Generator[StepSamples, None, None]:
    """Yield the samples of each step without end, from a position of the source; closing it ends the workers.

    Neither the workers nor a resume change which samples a step has. If a worker dies, all restart at the position that
    was reached, without the samples that kill their reader. Raises DataError if workers die repeatedly although each
    sample can be read, and what `poll` raises in a wait.
    """
    reader = DialogueReader(encoder)
    deaths: list[WorkerDeath] = []
    while True:
        try:
            for step, items in work_ahead(reader.read_step, source.steps(position), num_workers, poll):
                samples, rejections = sort_items(items)
                yield StepSamples(samples, rejections, step.position, deaths)
                position, deaths = step.position, []
        except WorkerDied as death:
            awaited = next(source.steps(position))
            deaths.append(WorkerDeath(death.how, reader.reject_killers(awaited.dialogues, poll)))
            if len(deaths) == MAX_DEATHS:
                raise DataError(_always_dying(death, num_workers)) from None
