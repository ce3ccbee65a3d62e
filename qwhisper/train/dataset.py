"""Dialogues to the rows of each optimizer step, read ahead by workers.

A bad dialogue becomes a named rejection, never an exception.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from qwhisper.data.collator import ConversationCollator, NoLabelsError, Sample
from qwhisper.data.conversation import Conversation
from qwhisper.data.sampler import GlobalBatch, GlobalBatches
from qwhisper.errors import BadClipError


@dataclass
class Rejection:
    """A dialogue that can't be trained on, and why."""

    id: str
    source: str
    reason: str


class EncodedDialogues(Dataset):
    """Item i: the rows of dialogue i, or its rejection."""

    def __init__(self, conversations: list[Conversation], collator: ConversationCollator):
        self.conversations = conversations
        self.collator = collator

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> list[Sample] | Rejection:
        conversation = self.conversations[index]
        try:
            return self.collator.encode_rows(conversation)
        except (BadClipError, NoLabelsError) as error:
            return Rejection(conversation.id, conversation.source, str(error))


@dataclass
class StepSamples:
    """What one optimizer step is given; epoch and offset are the sampler's position after it."""

    samples: list[Sample]
    rejections: list[Rejection]
    epoch: int
    offset: int


def encode_all(dataset: EncodedDialogues) -> tuple[list[Sample], list[Rejection]]:
    """Every dialogue's rows at once, for evaluation."""
    items = [dataset[i] for i in range(len(dataset))]
    rejections = [item for item in items if isinstance(item, Rejection)]
    return [sample for item in items if not isinstance(item, Rejection) for sample in item], rejections


def step_samples(
    dataset: EncodedDialogues, *, samples_per_step: int, seed: int, epoch: int, offset: int, num_workers: int
) -> Iterator[StepSamples]:
    """Endless, from a position in the epochs on.

    The order depends on the seed alone, not on the workers or on where it was resumed.
    """
    batches = GlobalBatches(num_samples=len(dataset), batch_size=samples_per_step, seed=seed)
    positions: list[GlobalBatch] = []

    def indices() -> Iterator[list[int]]:
        for batch in batches.starting_at(epoch, offset):
            positions.append(batch)
            yield batch.indices

    # A generator of its own: the loader would otherwise draw its workers' seed from the one that dropout uses.
    loader = DataLoader(
        dataset, batch_sampler=indices(), num_workers=num_workers, collate_fn=list, generator=torch.Generator()
    )
    for items in loader:
        position = positions.pop(0)
        rejections = [item for item in items if isinstance(item, Rejection)]
        samples = [sample for item in items if not isinstance(item, Rejection) for sample in item]
        yield StepSamples(samples, rejections, position.epoch, position.offset)
