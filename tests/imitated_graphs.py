"""CUDA graphs imitated on a CPU: a replay runs the recorded function again on the same inputs."""

from collections.abc import Callable

import torch

from qwhisper.engine.capture import Graphs, Outputs
from qwhisper.guards.gradient_buffers import GradientBuffers


class ImitatedGraphs(Graphs):
    """As on a GPU, recording changes nothing, and a replay writes into the same outputs.

    Unlike there, a replay runs Python: hooks are called, and numbers on the host are not those of the recording.
    """

    def __init__(self, buffers: GradientBuffers, most: int):
        super().__init__(torch.device("cpu"), most)
        self.buffers, self.replays = buffers, 0

    def record(self, run: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        before, generator = [flat.clone() for flat in self.buffers.flat], torch.get_rng_state()
        outputs = run()
        for flat, values in zip(self.buffers.flat, before, strict=True):
            flat.copy_(values)
        torch.set_rng_state(generator)

        def replay() -> None:
            self.replays += 1
            for mine, found in zip(outputs, run(), strict=True):
                if mine is not None:
                    mine.copy_(found)

        return outputs, replay
