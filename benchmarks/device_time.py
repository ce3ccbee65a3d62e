"""Times of work on the device as a CUDA graph runs it, without Python's part; on a CPU the time of one plain call."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from common import append_result

from qwhisper.errors import first_line

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEASUREMENTS = 5
REPLAYS = 4  # of a measurement
Result = TypeVar("Result")


@contextmanager
def failure_recorded(benchmark: str, **case) -> Iterator[None]:
    """A case that fails is a line of the results and does not end the other cases."""
    try:
        yield
    except Exception as error:
        append_result(benchmark, {**case, "failed": f"{type(error).__name__}: {first_line(error)[:200]}"})


def new_stream() -> torch.cuda.Stream:
    """A stream that waits for what was started so far."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def captured(
    work: Callable[[], Result], calls: int = 1, stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of some calls, and the result of the last one, which each replay writes again.

    Warm-up and capture take place on one stream. Autograd runs a node on the stream of its forward pass, and adds up a
    leaf's gradient on the stream where a graph that is still alive first used the leaf: such leaves must be made and
    used on `stream` alone, or the capture depends on another stream and fails.
    """
    stream = stream or new_stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.autograd.set_multithreading_enabled(False), torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            result = work()
    return graph, result


def microseconds(work: Callable[[], object], calls: int = 1) -> float:
    """Of one call of `work`; on a GPU the median of some measurements, each of replays of a graph of so many calls."""
    if DEVICE.type == "cpu":
        return 1e6 * seconds_of(work, calls=1)
    graph, _ = captured(work, calls)
    graph.replay()
    times = []
    for _ in range(MEASUREMENTS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / REPLAYS / calls)
    return sorted(times)[MEASUREMENTS // 2]


def seconds_of(work: Callable[[], object], calls: int) -> float:
    """Of one call as Python makes it, launches included."""
    wait()
    begun = time.perf_counter()
    for _ in range(calls):
        work()
    wait()
    return (time.perf_counter() - begun) / calls


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def forget_peak_memory() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(beyond: int = 0) -> float | None:
    """Most memory allocated since `forget_peak_memory`, less so many bytes; None on a CPU."""
    return round((torch.cuda.max_memory_allocated() - beyond) / 2**30, 3) if DEVICE.type == "cuda" else None
