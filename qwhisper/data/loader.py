"""Dialogues to the rows of each optimizer step, read ahead by processes that may die or hang.

A bad dialogue becomes a named rejection, never an exception.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from qwhisper.data.dialogue import Dialogue
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.light_tokenizer import dumps
from qwhisper.data.processes import Poll, Worker, WorkerDied, how_it_dies, nothing, stop, work_ahead
from qwhisper.data.rows import Sample
from qwhisper.data.source import Position, Source, StepDialogues
from qwhisper.errors import BadClipError, DataError

MAX_DEATHS = 3  # of workers in a row while the same samples are awaited
CHUNK = 16  # dialogues that a worker reads for an evaluation before it answers


@dataclass
class Rejection:
    """A dialogue that can't be trained on, and why."""

    id: str
    source: str
    reason: str


@dataclass
class DialogueReader:
    """Reads dialogues, here or in a worker, which is sent this object.

    killers: what is known of dialogues that kill or hang who reads them, by id; they are not read.
    """

    encoder: DialogueEncoder
    killers: dict[str, Rejection] = field(default_factory=dict)

    def read(self, dialogue: Dialogue) -> list[Sample] | Rejection:
        """The rows of a dialogue, or its rejection."""
        try:
            return self.encoder.encode_rows(dialogue)
        except DataError as error:
            return Rejection(dialogue.id, dialogue.source, str(error))

    def read_all(self, dialogues: Sequence[Dialogue]) -> list[list[Sample] | Rejection]:
        return [self.killers.get(dialogue.id) or self.read(dialogue) for dialogue in dialogues]

    def read_step(self, step: StepDialogues) -> list[list[Sample] | Rejection]:
        return self.read_all(step.dialogues)

    def reject_killers(self, dialogues: Iterable[Dialogue], poll: Poll = nothing) -> list[str]:
        """Read each in a throwaway process; reject from now on those that kill or hang it. Return their ids."""
        found = []
        for dialogue in dialogues:
            if dialogue.id not in self.killers and (how := how_it_dies(self.read, dialogue, poll)):
                self.killers[dialogue.id] = Rejection(dialogue.id, dialogue.source, _lost(dialogue, how))
                found.append(dialogue.id)
        return found


def _lost(dialogue: Dialogue, how: str) -> str:
    return f"{dialogue.source}: a process that reads it is lost ({how}); convert it, or leave it out"


@dataclass
class WorkerDeath:
    """A process that reads ahead died or hung. how: as in WorkerDied; samples: ids of those that it died of."""

    how: str
    samples: list[str]


@dataclass
class StepSamples:
    """What one optimizer step is given; `position` is the source's after it.

    deaths: of workers while these samples were awaited.
    """

    samples: list[Sample]
    rejections: list[Rejection]
    position: Position = None
    deaths: list[WorkerDeath] = field(default_factory=list)


def encode_all(
    dialogues: Sequence[Dialogue], encoder: DialogueEncoder, num_workers: int = 0
) -> tuple[list[Sample], list[Rejection]]:
    """Every dialogue's rows at once, for evaluation. With workers, one that kills its reader is a rejection."""
    reader = DialogueReader(encoder)
    chunks = [dialogues[first : first + CHUNK] for first in range(0, len(dialogues), CHUNK)]
    items: list[list[Sample] | Rejection] = []
    done = deaths = 0
    while done < len(chunks):
        try:
            for _, found in work_ahead(reader.read_all, iter(chunks[done:]), num_workers):
                items += found
                done, deaths = done + 1, 0
        except WorkerDied as death:
            reader.reject_killers(chunks[done])
            deaths += 1
            if deaths == MAX_DEATHS:
                raise DataError(_always_dying(death, num_workers)) from None
    return _sort(items)


def _always_dying(death: WorkerDied, num_workers: int) -> str:
    return (
        f"{MAX_DEATHS} times in a row a process that reads audio was lost ({death.how}), and no sample was found to be "
        f"at fault: too little memory or too many processes, perhaps; lower --dataloader_num_workers {num_workers}"
    )


def _sort(items: list[list[Sample] | Rejection]) -> tuple[list[Sample], list[Rejection]]:
    rejections = [item for item in items if isinstance(item, Rejection)]
    return [sample for item in items if not isinstance(item, Rejection) for sample in item], rejections


def step_samples(
    source: Source, encoder: DialogueEncoder, *, position: Position = None, num_workers: int = 0, poll: Poll = nothing
) -> Generator[StepSamples, None, None]:
    """Endless, from a position of the source on; closing it ends the workers.

    Neither the workers nor a resume change which samples a step has. Where a worker dies, all are started again at the
    position that was reached, without the samples that kill whoever reads them. Raises DataError where they die in a
    row though each sample can be read, and what `poll` raises in a wait.
    """
    reader = DialogueReader(encoder)
    deaths: list[WorkerDeath] = []
    while True:
        try:
            for step, items in work_ahead(reader.read_step, source.steps(position), num_workers, poll):
                samples, rejections = _sort(items)
                yield StepSamples(samples, rejections, step.position, deaths)
                position, deaths = step.position, []
        except WorkerDied as death:
            awaited = next(source.steps(position))
            deaths.append(WorkerDeath(death.how, reader.reject_killers(awaited.dialogues, poll)))
            if len(deaths) == MAX_DEATHS:
                raise DataError(_always_dying(death, num_workers)) from None


class ThrowawayEncoder(DialogueEncoder):
    """An encoder whose `encode` runs in a process that may die of a dialogue: the error then names that one."""

    def __init__(self, encoder: DialogueEncoder):
        vars(self).update(vars(encoder))
        self._pickled = dumps(encoder.encode)
        self._worker: Worker | None = None

    def encode(self, dialogue: Dialogue) -> Sample:  # type: ignore[override]  # a dict has no source to name
        """Raises as DialogueEncoder's, and BadClipError where the process is lost. The next call starts another one."""
        try:
            self._worker = self._worker or Worker(self._pickled)
            self._worker.give(dialogue)
            return self._worker.answer()
        except WorkerDied as death:
            self.close()
            raise BadClipError(_lost(dialogue, death.how)) from None

    def close(self) -> None:
        stop([self._worker] if self._worker else [])
        self._worker = None


@contextmanager
def apart(encoder: DialogueEncoder, num_workers: int) -> Iterator[DialogueEncoder]:
    """The encoder, or with workers one that encodes in a process of its own."""
    if not num_workers:
        yield encoder
        return
    throwaway = ThrowawayEncoder(encoder)
    try:
        yield throwaway
    finally:
        throwaway.close()
