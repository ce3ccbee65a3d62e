"""What throughput.py measures in the process that trains: times, memory, launches, packs, and the work they need."""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps

import torch
from torch import Tensor
from transformers import TrainerCallback

from qwhisper.data.rows import Sample
from qwhisper.engine import batch as batches
from qwhisper.frames import SAMPLE_RATE, FrameArithmetic, encoder_frames, mel_frames

PROFILED_STEPS = 2  # after the timed ones
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch", "cudaMemcpyAsync")  # prefixes


@dataclass
class Pack:
    """Lengths of a pack's samples in tokens, of its windows in encoder frames, and what was computed for them.

    frames: what the encoder computes, or what the cache gives, without the silence; real_frames: of these, all but
    padding. taught: lengths of the rows that the samples' teachers read; num_taught: positions with a teacher.
    """

    segments: list[int]
    windows: list[int]
    supervised: int
    tokens: int
    frames: int
    real_frames: int
    taught: list[int] = field(default_factory=list)
    num_taught: int = 0


def pack_of(samples: Sequence[Sample], arithmetic: FrameArithmetic, batch: batches.Batch, *, teach: bool) -> Pack:
    """What is real comes from the samples, what is computed from the batch's shape."""
    windows = [encoder_frames(mel_frames(len(window))) for sample in samples for window in sample.windows]
    cached = batch.audio is not None and batch.audio.layout.encoder is None
    kept = [len(range(frames)[arithmetic.kept_frames(frames)]) for frames in windows] if cached else windows
    teachers = batches.taught_by(samples) if teach else []
    return Pack(
        segments=[len(sample.input_ids) for sample in samples],
        windows=windows,
        supervised=sum(sample.num_supervised for sample in samples),
        tokens=batch.shape.tokens,
        frames=batch.shape.encoder_frames,
        real_frames=sum(kept),
        taught=[len(teacher.input_ids) for teacher in teachers],
        num_taught=sum(teacher.num_supervised for teacher in teachers),
    )


@contextmanager
def counting(found: list[Pack], wanted: Callable[[], bool]) -> Iterator[None]:
    """Append each pack that is made while `wanted()`, on the host: a graph's replay passes through no other place.

    Packs are made ahead of their step, in another thread, so they are not those of certain steps: figures are a sample.
    Replaces the functions that make batches in every module of the package that has them.
    """
    replaced: list[tuple[object, str, Callable]] = []
    for make in (batches.packed_batch, batches.padded_batch):

        @wraps(make)
        def counted(samples, arithmetic, *args, _make=make, **kwargs):
            batch = _make(samples, arithmetic, *args, **kwargs)
            if wanted():
                found.append(pack_of(samples, arithmetic, batch, teach=kwargs.get("teach", False)))
            return batch

        name = make.__name__
        for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "qwhisper"]:
            if getattr(module, name, None) is make:
                replaced.append((module, name, make))
                setattr(module, name, counted)
    try:
        yield
    finally:
        for module, name, make in replaced:
            setattr(module, name, make)


class Meter(TrainerCallback):
    """Times steps `skip` + 1 to `last`, then profiles PROFILED_STEPS; counts packs from step `skip` on. Steps are
    counted from the start or the resume of the run.

    began: the start of the process on the clock of `time.monotonic`, which all processes share.
    """

    def __init__(self, skip: int, last: int, began: float):
        self.skip, self.last, self.began = skip, last, began
        self.packs: list[Pack] = []
        self.ends: list[float] = []  # of each step, on the clock of perf_counter
        self.seconds = self.kernel_s = self.first_step_s = 0.0
        self.launches = self.start = 0
        self.kernels: dict[str, tuple[int, int]] = {}  # name: calls, nanoseconds
        self.model: torch.nn.Module | None = None
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        # The listening probe makes packs as well, in evaluation mode.
        self._counting = counting(self.packs, lambda: bool(self.model and self.model.training))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model, self.start = model, state.global_step
        self.ends = [time.perf_counter()]

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step - self.start
        if torch.cuda.is_available() and step in (1, self.skip, self.last, self.last + PROFILED_STEPS):
            torch.cuda.synchronize()
        if step == 1:
            self.first_step_s = time.monotonic() - self.began
        if step <= self.last:
            self.ends.append(time.perf_counter())
        if step == self.skip:
            self._counting.__enter__()
        if step == self.last:
            self.seconds = self.ends[self.last] - self.ends[self.skip]
            if torch.cuda.is_available():
                self._profiler.start()
        if step == self.last + PROFILED_STEPS:
            self._counting.__exit__(None, None, None)
            if torch.cuda.is_available():
                self._profiler.stop()
                self._read_profile()

    def _read_profile(self) -> None:
        spans = []
        for event in self._profiler.profiler.kineto_results.events():
            if event.device_type() == torch.autograd.DeviceType.CUDA:
                spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
                calls, spent = self.kernels.get(event.name(), (0, 0))
                self.kernels[event.name()] = (calls + 1, spent + event.duration_ns())
            elif event.name().startswith(LAUNCHES):
                self.launches += 1
        self.kernel_s = covered(spans) / 1e9

    def top_kernels(self, count: int = 25) -> str:
        """One line a kernel: milliseconds and calls of a step, share of all kernels' time, name."""
        total = max(1, sum(spent for _, spent in self.kernels.values()))
        lines = []
        for name, (calls, spent) in sorted(self.kernels.items(), key=lambda item: -item[1][1])[:count]:
            milliseconds = spent / 1e6 / PROFILED_STEPS
            lines.append(f"{milliseconds:9.2f} ms {calls / PROFILED_STEPS:8.0f} x {spent / total:6.1%}  {name[:120]}")
        return "\n".join(lines)


def covered(spans: Sequence[tuple[int, int]]) -> int:
    """The length that spans (start, end) cover together."""
    total, reached = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def useful_flops(model: torch.nn.Module, packs: Sequence[Pack], *, encoded: bool = True) -> float:
    """Floating-point operations that the samples need, a multiply-add as two: no padding, no recompute.

    Forward: 2 a weight and row; each attention 4 × width a pair of rows that see each other (causal in the language
    model). Backward: the same again for the gradient of the input, and once more for that of a trained weight. The
    frozen encoder (encoded: it runs at all) and the teacher have no backward pass; the head counts at supervised
    positions. Sizes are the configuration's, because a quantised weight has another shape.
    """
    body, config = model.model, model.config
    text, audio = config.get_text_config(), config.audio_config
    width, key_width = (heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    of_layer = text.hidden_size * (2 * width + 2 * key_width + 3 * text.intermediate_size)
    frozen, head = of_layer * text.num_hidden_layers, text.vocab_size * text.hidden_size
    trained = sum(p.numel() for _, p in _matrices(body.language_model) if p.requires_grad)
    projector = sum(p.numel() for _, p in _matrices(body.multi_modal_projector))
    encoder = sum(p.numel() for _, p in _matrices(body.audio_tower.layers))
    convolutions = sum(p.numel() for p in (body.audio_tower.conv1.weight, body.audio_tower.conv2.weight))
    total = 0.0
    for pack in packs:
        tokens, frames = sum(pack.segments), sum(pack.windows)
        pairs, seen = _causal_pairs(pack.segments), sum(n * n for n in pack.windows)
        total += (4 * frozen + 6 * trained) * tokens
        total += 3 * 4 * width * pairs * text.num_hidden_layers
        total += 4 * head * pack.supervised
        total += 6 * projector * frames / config.projector_stack
        if encoded:
            total += 2 * (encoder + 2 * convolutions) * frames + 4 * audio.d_model * seen * audio.encoder_layers
        total += 2 * frozen * sum(pack.taught) + 2 * head * pack.num_taught
        total += 4 * width * _causal_pairs(pack.taught) * text.num_hidden_layers
    return total


def _causal_pairs(lengths: Sequence[int]) -> float:
    return sum(n * n / 2 for n in lengths)


def _matrices(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Weights of matrix products."""
    return [(name, p) for name, p in module.named_parameters() if p.dim() == 2 and "embed" not in name]


def matmul_peak(size: int = 8192, repeats: int = 20) -> float:
    """The most TFLOP/s of a product of two bf16 matrices; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(repeats):
            a @ b
        torch.cuda.synchronize()
        best = max(best, 2 * size**3 * repeats / (time.perf_counter() - begun) / 1e12)
    return best


def speed(meter: Meter, samples: int) -> dict[str, float]:
    """samples: of a step."""
    steps = [end - start for start, end in itertools.pairwise(meter.ends[meter.skip :])]
    return {
        "samples_s": round(samples * len(steps) / meter.seconds, 2),
        "slowest_step": round(max(steps) / statistics.median(steps), 2),
        "first_step_s": round(meter.first_step_s, 1),
    }


def figures(meter: Meter, samples: int, *, encoded: bool = True) -> dict[str, float]:
    """All figures of a measured run. samples: of a step; encoded: the encoder runs in each step."""
    reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0  # before the matrix products below
    packs, model, step_s = meter.packs, meter.model, meter.seconds / (meter.last - meter.skip)
    assert packs and model is not None, "no pack was counted: are batches made elsewhere than in engine/batch.py?"
    steps = sum(len(pack.segments) for pack in packs) / samples  # that the packs are worth
    useful = useful_flops(model, packs, encoded=encoded) / steps / step_s / 1e12
    frames, windows = sum(sum(pack.windows) for pack in packs), sum(len(pack.windows) for pack in packs)
    seconds = (frames * 320 - model.config.frames.silence_samples * windows) / SAMPLE_RATE / steps
    return speed(meter, samples) | {
        "max_reserved_gib": round(reserved / 2**30, 2),
        "audio_hours_per_gpu_hour": round(seconds / step_s, 1),
        "useful_tflops": round(useful, 2),
        "matmul_peak_tflops": round(matmul_peak(), 1),
        "gpu_busy": round(meter.kernel_s / PROFILED_STEPS / step_s, 3),
        "launches_per_pack": round(meter.launches / PROFILED_STEPS / (len(packs) / steps)),
        "packs_per_step": round(len(packs) / steps, 2),
        "fill_tokens": round(sum(sum(pack.segments) for pack in packs) / sum(pack.tokens for pack in packs), 3),
        "fill_frames": round(sum(pack.real_frames for pack in packs) / max(1, sum(pack.frames for pack in packs)), 3),
        "recompiles": sum(torch._dynamo.utils.counters["recompiles"].values()),
    }
