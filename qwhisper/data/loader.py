"""Dialogues to the rows of each optimizer step, read ahead by workers.

A bad dialogue becomes a named rejection, never an exception.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from qwhisper.data.collator import ConversationCollator, Sample
from qwhisper.data.dialogue import Conversation
from qwhisper.data.sampler import GlobalBatches
from qwhisper.data.workers import WorkerDied, how_it_dies, work_ahead
from qwhisper.errors import DataError

MAX_DEATHS = 3  # of workers in a row while the same samples are awaited
CHUNK = 16  # dialogues that a worker reads for an evaluation before it answers


@dataclass
class Rejection:
    """A dialogue that can't be trained on, and why."""

    id: str
    source: str
    reason: str


class EncodedDialogues:
    """Item i: the rows of dialogue i, or its rejection."""

    def __init__(self, conversations: Sequence[Conversation], collator: ConversationCollator):
        self.conversations = conversations
        self.collator = collator
        self.killers: dict[int, Rejection] = {}

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> list[Sample] | Rejection:
        conversation = self.conversations[index]
        try:
            return self.collator.encode_rows(conversation)
        except DataError as error:
            return Rejection(conversation.id, conversation.source, str(error))

    def items(self, indices: Iterable[int]) -> list[list[Sample] | Rejection]:
        return [self.killers[index] if index in self.killers else self[index] for index in indices]

    def reject_killers(self, indices: Iterable[int]) -> list[str]:
        """Reads each in a process of its own; what that is lost by is a rejection from now on. Returns their ids."""
        found = []
        for index in indices:
            if index not in self.killers and (how := how_it_dies(self.__getitem__, index)):
                conversation = self.conversations[index]
                reason = f"{conversation.source}: a process that reads it is lost ({how}); convert it, or leave it out"
                self.killers[index] = Rejection(conversation.id, conversation.source, reason)
                found.append(conversation.id)
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


def encode_all(dataset: EncodedDialogues, num_workers: int = 0) -> tuple[list[Sample], list[Rejection]]:
    """Every dialogue's rows at once, for evaluation. With workers, one that kills its reader is a rejection."""
    chunks = [range(first, min(first + CHUNK, len(dataset))) for first in range(0, len(dataset), CHUNK)]
    items: list[list[Sample] | Rejection] = []
    done = deaths = 0
    while done < len(chunks):
        try:
            for _, found in work_ahead(dataset.items, iter(chunks[done:]), num_workers):
                items += found
                done, deaths = done + 1, 0
        except WorkerDied as death:
            dataset.reject_killers(chunks[done])
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
                samples, rejections = _sort(items)
                yield StepSamples(samples, rejections, batch.epoch, batch.offset, deaths)
                epoch, offset, deaths = batch.epoch, batch.offset, []
        except WorkerDied as death:
            awaited = next(batches.starting_at(epoch, offset))
            deaths.append(WorkerDeath(death.how, dataset.reject_killers(awaited.indices)))
            if len(deaths) == MAX_DEATHS:
                raise DataError(_always_dying(death, num_workers)) from None
