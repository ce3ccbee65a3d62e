"""Batches of the coming step, built on the host while the device works on the present one."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qwhisper.data.rows import Sample
from qwhisper.engine.batch import Batch
from qwhisper.model.audio_layout import pinned

STEPS = 2  # the present one and the next; what is left of an older one is not needed any more
Make = Callable[[Sequence[Sample]], Batch]


@dataclass(frozen=True, eq=False)
class _Built:
    """pack: kept, so that no other samples get its ids."""

    pack: Sequence[Sample]
    make: Make
    batch: Batch


class HostBatches:
    """Keeps batches that another thread builds, until the step that needs them takes them.

    With a GPU as the device they are in pinned memory, from which copies need no wait. A batch may be dropped as soon
    as its copies are enqueued: PyTorch uses pinned memory again only after the copies from it are done.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pins = device.type == "cuda"
        self._steps: deque[dict[tuple[int, ...], _Built]] = deque(maxlen=STEPS)

    def prepare(self, packs: Sequence[Sequence[Sample]], make: Make) -> None:
        """Build the batches of a step. make: a pack's batch on the host. Raises what it raises."""
        self._steps.append({_key(pack): _Built(pack, make, self._on_host(make(pack))) for pack in packs})

    def take(self, pack: Sequence[Sample], make: Make) -> Batch:
        """The batch of exactly these samples, in this order, as `make` makes it: the one that was prepared in the same
        way, the first time, or one made now.
        """
        for step in tuple(self._steps):
            if (built := step.pop(_key(pack), None)) is not None and built.make == make:
                return built.batch
        return make(pack)

    def _on_host(self, batch: Batch) -> Batch:
        if self._pins:
            try:
                with torch.cuda.device(self._device):
                    return pinned(batch)
            except RuntimeError:  # the memory that may be pinned is limited
                self._pins = False
        return batch


def _key(pack: Sequence[Sample]) -> tuple[int, ...]:
    return tuple(map(id, pack))
