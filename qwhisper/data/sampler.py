"""Which samples an optimizer step sees: a function of seed and position alone, so that a resume continues exactly."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The permutation, int64 [num_samples], in which an epoch sees the samples.

    Sorts raw bits: numpy promises a bit generator's stream across versions, but not what `permutation` makes of it.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(bits, kind="stable")


class GlobalBatch(NamedTuple):
    """The samples of one optimizer step; `epoch` and `offset` are the position after it, which a checkpoint keeps."""

    indices: list[int]
    epoch: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class GlobalBatches:
    """Endless batches of sample indices, epoch after epoch; the short last batch of an epoch is an ordinary one."""

    num_samples: int
    batch_size: int
    seed: int

    def __post_init__(self):
        if self.num_samples < 1 or self.batch_size < 1:
            raise ValueError(f"cannot draw batches of {self.batch_size} from {self.num_samples} samples")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def starting_at(self, epoch: int = 0, offset: int = 0) -> Iterator[GlobalBatch]:
        """From a position: `offset` samples of that epoch are done."""
        while True:
            order = epoch_order(self.num_samples, seed=self.seed, epoch=epoch)
            while offset < self.num_samples:
                end = min(offset + self.batch_size, self.num_samples)
                done = end == self.num_samples
                yield GlobalBatch(order[offset:end].tolist(), epoch + done, 0 if done else end)
                offset = end
            epoch, offset = epoch + 1, 0
