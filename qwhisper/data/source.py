"""Sources: which dialogues each optimizer step is given.

A source's position is an opaque JSON value: a checkpoint keeps it, and only the source that made it looks inside.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwhisper.data.dialogue import Dialogue

Position = Any  # a JSON value; None is the beginning


class StepDialogues(NamedTuple):
    """The dialogues of one optimizer step, and the source's position after it."""

    dialogues: Sequence[Dialogue]
    position: Position


class Source(Protocol):
    """Where the dialogues come from: a function of the position, so that a resume continues exactly."""

    def steps(self, position: Position = None) -> Iterator[StepDialogues]:
        """Yield steps without end, from a position on."""

    def passes(self, position: Position) -> int:
        """Number of whole passes over the data that are done at a position."""


@dataclass(frozen=True, kw_only=True)
class ShuffledDialogues:
    """Dialogues in memory, pass after pass, each in a new order that the seed decides.

    The short last step of a pass is an ordinary one. Position: {"epoch": passes done, "offset": dialogues of the next
    pass that are done}.
    """

    dialogues: Sequence[Dialogue]
    samples_per_step: int
    seed: int

    def __post_init__(self):
        if not self.dialogues or self.samples_per_step < 1:
            raise ValueError(f"cannot draw steps of {self.samples_per_step} from {len(self.dialogues)} dialogues")

    def steps(self, position: Position = None) -> Iterator[StepDialogues]:
        epoch, offset = _epoch_and_offset(position)
        count = len(self.dialogues)
        while True:
            order = epoch_order(count, seed=self.seed, epoch=epoch)
            while offset < count:
                end = min(offset + self.samples_per_step, count)
                chosen = [self.dialogues[index] for index in order[offset:end]]
                offset = end
                after = epoch_position(epoch, offset) if offset < count else epoch_position(epoch + 1, 0)
                yield StepDialogues(chosen, after)
            epoch, offset = epoch + 1, 0

    def passes(self, position: Position) -> int:
        return _epoch_and_offset(position)[0]


def epoch_position(epoch: int, offset: int) -> Position:
    """The position of ShuffledDialogues after `epoch` passes and `offset` dialogues of the next one."""
    return {"epoch": epoch, "offset": offset}


def check_position(position: Position) -> None:
    """Raises ValueError for a JSON value that is no position of a source in this module."""
    _epoch_and_offset(position)


def _epoch_and_offset(position: Position) -> tuple[int, int]:
    if position is None:
        return 0, 0
    if isinstance(position, dict) and position.keys() == {"epoch", "offset"}:
        epoch, offset = position["epoch"], position["offset"]
        if type(epoch) is int and type(offset) is int and min(epoch, offset) >= 0:
            return epoch, offset
    raise ValueError(f"position is {position!r:.80}, which no source of dialogues gives")


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in an epoch: a permutation, int64 [num_samples].

    Sorts raw bits: numpy promises a bit generator's stream across versions, but not the result of `permutation`.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(bits, kind="stable")
