"""Passes over packs as CUDA graphs: one for each shape, recorded at the second pass of that shape, then replayed.

A pass is a function of tensors that keep their place: its inputs are copied into fixed ones. All passes, recorded or
not, take their memory from one pool, so that graphs of many shapes need the memory of the largest. Values in the pool
are lost with the next pass: outputs are copied out, and what a later pass reads is written to tensors outside of it.
"""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwhisper.guards.gradient_buffers import GradientBuffers
from qwhisper.model.audio_layout import on_device

Outputs = tuple[Tensor | None, ...]
Function = Callable[[Any], Outputs]
MOST_GRAPHS = 96  # later shapes run without a graph; the driver keeps some MB for each


@dataclass
class Pass:
    """inputs: a dataclass whose tensors keep their place. replay: None until it is recorded. reached: the parameters
    that it gives gradients.
    """

    inputs: Any
    replay: Callable[[], None] | None = None
    outputs: Outputs = ()
    reached: list[nn.Parameter] = field(default_factory=list)


class Graphs:
    """The passes of one model by shape. most: graphs; 0 for none. first: context of the first pass of a shape."""

    def __init__(self, device: torch.device, most: int, first: Callable[[], AbstractContextManager[None]]):
        self.device, self.most, self._first = device, most, first
        self.passes: dict[Hashable, Pass] = {}
        self._seen: set[Hashable] = set()
        self._prepared, self._seconds = 0, 0.0
        self._on_cuda = device.type == "cuda"
        self._pool = torch.cuda.MemPool() if self._on_cuda else None
        self._stream = torch.cuda.Stream(device) if self._on_cuda else None

    def run(self, key: Hashable, inputs: Any, function: Function, buffers: GradientBuffers) -> Outputs:
        """The outputs of `function(inputs)`. key: what determines all sizes, and everything else but tensors' values.

        inputs: a dataclass of tensors on any device. function: reads no value of a tensor on the host.
        """
        known = self.passes.get(key)
        if known is None:
            known = Pass(on_device(inputs, self.device))
            if len(self.passes) < self.most:
                self.passes[key] = known
            return self._run_unrecorded(key, known, function)
        copy_into(known.inputs, inputs)
        if known.replay is None:
            self._record(known, function, buffers)
        assert known.replay is not None
        known.replay()
        for parameter in known.reached:
            buffers.attach(parameter)
        return _copies(known.outputs)

    def forget(self) -> None:
        """Drop all passes and their memory."""
        self.passes.clear()
        if self._on_cuda:
            torch.cuda.synchronize()
            self._pool = torch.cuda.MemPool()
            torch.cuda.empty_cache()

    def take_preparation(self) -> tuple[int, float]:
        """Number of first passes and recordings since the last call, and their seconds."""
        taken = self._prepared, self._seconds
        self._prepared, self._seconds = 0, 0.0
        return taken

    @contextmanager
    def _preparing(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._prepared, self._seconds = self._prepared + 1, self._seconds + time.perf_counter() - begun

    def _run_unrecorded(self, key: Hashable, known: Pass, function: Function) -> Outputs:
        with ExitStack() as contexts:
            if key not in self._seen:
                contexts.enter_context(self._preparing())
                contexts.enter_context(self._first())
            with self._in_pool():
                outputs = function(known.inputs)
        self._seen.add(key)
        return _copies(outputs)

    def _record(self, known: Pass, function: Function, buffers: GradientBuffers) -> None:
        with self._preparing(), buffers.recording() as known.reached:
            known.outputs, known.replay = self.record(lambda: function(known.inputs))

    def record(self, run: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """Record the kernels of `run`. Returns its outputs, which have values after a replay, and the replay."""
        assert self._pool is not None
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate pinned memory meanwhile.
        recording = torch.cuda.graph(
            graph,
            pool=self._pool.id,  # type: ignore[arg-type]
            stream=self._stream,
            capture_error_mode="thread_local",
        )
        cause: Exception | None = None
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), recording:
                try:
                    with torch.autograd.set_multithreading_enabled(False):
                        outputs = run()
                except Exception as error:
                    cause = error  # torch's error at the end of a failed recording names none
                    raise
        except Exception as error:
            self._end_failed_recording()
            raise cause or error from None
        return outputs, graph.replay

    def _end_failed_recording(self) -> None:
        """Leave the state that torch's allocator and generator keep while a graph is recorded: a failed recording does
        not, and memory would never be freed again nor a random number drawn. The end of another recording does.
        """
        assert self._pool is not None
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool.id)
        with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream):
            torch.zeros((), device=self.device)

    @contextmanager
    def _in_pool(self) -> Iterator[None]:
        """Memory comes from the pool. Autograd works in this thread then, because the pool is the thread's."""
        if self._pool is None or self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.use_mem_pool(self._pool),
                torch.autograd.set_multithreading_enabled(False),
            ):
                yield
        finally:  # kernels of a failed pass may still write gradients
            torch.cuda.current_stream().wait_stream(self._stream)


def copy_into(mine: Any, other: Any) -> None:
    """Copy the tensors of a dataclass, also those of dataclasses in it, into those of another of the same sizes."""
    for item in fields(mine):
        here, there = getattr(mine, item.name), getattr(other, item.name)
        if isinstance(here, Tensor):
            here.copy_(there, non_blocking=True)
        elif is_dataclass(here):
            copy_into(here, there)
        elif here != there:
            raise ValueError(f"{item.name} is {there!r:.80}, and {here!r:.80} in the inputs of this pass")


def _copies(outputs: Outputs) -> Outputs:
    return tuple(None if output is None else output.clone() for output in outputs)
