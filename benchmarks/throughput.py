"""Samples a second of `qwhisper train` with shipped recipes, beside a plain loop; one case a call.

    python benchmarks/throughput.py --tokenizer DIR --output_dir DIR --case 0.6b

Guards, probe, log, checkpoints and loader are on. Real shapes and random weights, noise of 1 to 30 s (real_shapes.py).
At most 30.0 GiB may be reserved on the card. The plain loop (plain_loop.py) runs in the same call on the same clips;
--no_plain leaves it out. `bases` and `data` in the output folder are used again by later calls.

- samples_s: over whole steps, the first ones left out. gpu_busy: the kernels' time of a profiled step, overlaps counted
  once, divided by the time of a step that is not profiled. launches_per_pack: launches of kernels, and of graphs.
- useful_tflops: see `useful_flops`; no padding, no recompute. matmul_peak_tflops: bf16, measured in the same call.
- fill_tokens, fill_frames: real tokens and encoder frames ÷ computed ones, mean of the counted steps.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import RESULTS, append_result, circumstances
from real_shapes import SIZES, make_bases, make_data
from torch import Tensor
from transformers import TrainerCallback

from qwhisper.commands import VERBS
from qwhisper.engine import executor
from qwhisper.frames import SAMPLE_RATE
from qwhisper.parsing import parse
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.run import main as train

MOST_GIB = 30.0  # of a card of 32 GB
COUNTED_STEPS = 2  # after the timed ones: profiled, and their packs counted


@dataclass(frozen=True)
class Case:
    """batch: samples of a step. plain: (samples of a batch, accumulation, recompute) of the plain loop."""

    size: str
    recipe: str
    batch: int
    plain: tuple[int, int, bool] | None
    steps: int = 12
    flags: tuple[str, ...] = ()


CASES = {
    "tiny": Case("tiny", "qwen3-0.6b-32gb", 4, (2, 2, False), steps=4),
    "0.6b": Case("0.6b", "qwen3-0.6b-32gb", 128, (16, 8, False)),
    "0.6b-1x4": Case("0.6b", "qwen3-8b-32gb", 4, (1, 4, False), steps=60),
    "0.6b-distill": Case("0.6b", "keep-thinking", 128, None),
    "0.6b-no-distill": Case("0.6b", "keep-thinking", 128, None, flags=("--distill_weight", "0")),
    "8b-bf16": Case("8b", "qwen3-8b-32gb", 128, (8, 16, True), steps=6, flags=("--gradient_checkpointing",)),
    "8b-bf16-1x4": Case("8b", "qwen3-8b-32gb", 4, (1, 4, True), steps=40),
    "8b-nf4": Case("8b", "qwen3-8b-4bit-32gb", 4, None, steps=40),
}


@dataclass
class Pack:
    """Lengths of a pack's real segments, of its windows in encoder frames, and what was computed for them."""

    segments: list[int]
    windows: list[int]
    supervised: int
    tokens: int
    frames: int


@dataclass
class Counted:
    packs: list[Pack] = field(default_factory=list)

    @contextmanager
    def counting(self) -> Iterator[None]:
        run = executor.run_pack

        def counted(model, batch, distill_weight):
            borders = batch.text.cu_seq_lens_host or ()
            real = int(batch.text.real.sum())
            segments = [end - start for start, end in itertools.pairwise(borders) if end <= real and end > start]
            audio = () if batch.audio is None else batch.audio.layout.encoder.cu_seq_lens_host
            windows = [end - start for start, end in itertools.pairwise(audio) if end > start]
            supervised = int((batch.text.targets >= 0).sum())
            pack = Pack(segments, windows, supervised, batch.shape.tokens, batch.shape.encoder_frames)
            self.packs.append(pack)
            return run(model, batch, distill_weight)

        executor.run_pack = counted
        try:
            yield
        finally:
            executor.run_pack = run


class Meter(TrainerCallback):
    """Times steps `skip` to `last`; then profiles and counts COUNTED_STEPS."""

    def __init__(self, skip: int, last: int):
        self.skip, self.last, self.counted = skip, last, Counted()
        self.begun = self.seconds = 0.0
        self.kernel_s, self.launches = 0.0, 0
        self.model: torch.nn.Module | None = None
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._counting = self.counted.counting()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if step == self.skip:
            self.begun = time.perf_counter()
        if step == self.last:
            self.seconds = time.perf_counter() - self.begun
            self._counting.__enter__()
            if torch.cuda.is_available():
                self._profiler.start()
        if step == self.last + COUNTED_STEPS:
            self._counting.__exit__(None, None, None)
            if torch.cuda.is_available():
                self._profiler.stop()
                self._read_profile()

    def _read_profile(self) -> None:
        spans = []
        for event in self._profiler.profiler.kineto_results.events():
            if event.device_type() == torch.autograd.DeviceType.CUDA:
                spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            elif event.name() in (
                "cudaLaunchKernel",
                "cudaLaunchKernelExC",
                "cuLaunchKernel",
                "cuLaunchKernelEx",
                "cudaGraphLaunch",
            ):
                self.launches += 1
        self.kernel_s = covered(spans) / 1e9


def covered(spans: Sequence[tuple[int, int]]) -> int:
    """The length that spans (start, end) cover together."""
    total, reached = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def useful_flops(model: torch.nn.Module, packs: Sequence[Pack]) -> float:
    """Floating-point operations that the samples need, a multiply-add as two.

    Forward: 2 a weight and row; each attention 4 × width a pair of rows that see each other (causal in the language
    model). Backward: the same again for the gradient of the input, and once more for that of a trained weight. The
    frozen encoder has no backward pass; the head counts at supervised positions.
    """
    body, config = model.model, model.config
    text, audio = config.get_text_config(), config.audio_config
    frozen = sum(p.numel() for name, p in _linears(body.language_model) if not p.requires_grad)
    trained = sum(p.numel() for name, p in _linears(body.language_model) if p.requires_grad)
    projector = sum(p.numel() for p in body.multi_modal_projector.parameters() if p.dim() == 2)
    encoder = sum(p.numel() for p in body.audio_tower.layers.parameters() if p.dim() == 2)
    convolutions = sum(p.numel() for p in (body.audio_tower.conv1.weight, body.audio_tower.conv2.weight))
    width = text.num_attention_heads * text.head_dim
    total = 0.0
    for pack in packs:
        tokens, frames = sum(pack.segments), sum(pack.windows)
        pairs, seen = sum(n * n / 2 for n in pack.segments), sum(n * n for n in pack.windows)
        total += (4 * frozen + 6 * trained) * tokens
        total += 3 * 4 * width * pairs * text.num_hidden_layers
        total += 4 * text.vocab_size * text.hidden_size * pack.supervised
        total += 6 * projector * frames / config.projector_stack
        total += 2 * (encoder + 2 * convolutions) * frames + 4 * audio.d_model * seen * audio.encoder_layers
    return total


def _linears(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Weights of matrix products; the embeddings are looked up."""
    return [(name, p) for name, p in module.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]


def matmul_peak(size: int = 8192, repeats: int = 20) -> float:
    """The most TFLOP/s of a product of two bf16 matrices."""
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


def measure(case: Case, audio: Path, text: Path, data: Path, run: Path) -> dict:
    """Train with the product in this process, and measure it."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, MOST_GIB * 2**30 / total))
    skip = max(1, case.steps // 3)
    meter = Meter(skip, case.steps)
    flags = [
        "--config", case.recipe, "--train_file", data, "--output_dir", run,
        "--audio_model", audio, "--text_model", text,
        "--per_device_train_batch_size", case.batch, "--gradient_accumulation_steps", 1, "--num_train_epochs", 1000,
        "--max_steps", case.steps + COUNTED_STEPS, "--dataloader_num_workers", 8 if on_gpu else 0, *case.flags,
    ]  # fmt: skip
    code = train(parse("train", VERBS["train"], TrainArguments, [str(flag) for flag in flags]), [meter])
    assert code == 0, f"the training ended with exit code {code}"
    packs, step_s = meter.counted.packs, meter.seconds / (case.steps - skip)
    peak, useful = matmul_peak(), useful_flops(meter.model, packs) / COUNTED_STEPS / step_s / 1e12
    windows = sum(sum(pack.windows) for pack in packs)
    silence = meter.model.config.frames.silence_samples
    seconds = (windows * 320 - silence * sum(len(pack.windows) for pack in packs)) / SAMPLE_RATE / COUNTED_STEPS
    return {
        "samples_s": round(case.batch / step_s, 2),
        "max_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_gpu else 0.0,
        "audio_hours_per_gpu_hour": round(seconds / step_s, 1),
        "useful_tflops": round(useful, 2),
        "matmul_peak_tflops": round(peak, 1),
        "gpu_busy": round(meter.kernel_s / COUNTED_STEPS / step_s, 3),
        "launches_per_pack": round(meter.launches / len(packs)),
        "fill_tokens": round(sum(sum(pack.segments) for pack in packs) / sum(pack.tokens for pack in packs), 3),
        "fill_frames": round(windows / max(1, sum(pack.frames for pack in packs)), 3),
        "recompiles": sum(torch._dynamo.utils.counters["recompiles"].values()),
    }


def plain(case: Case, audio: Path, text: Path, data: Path) -> dict:
    """The result of the plain loop, run in a new process so that it has the whole memory of the card."""
    assert case.plain is not None
    batch, accumulate, recompute = case.plain
    command = [
        sys.executable, Path(__file__).with_name("plain_loop.py"), "--audio_model", audio, "--text_model", text,
        "--train_file", data, "--batch", batch, "--accumulate", accumulate,
        "--steps", max(3, case.steps // 2), "--skip", max(1, case.steps // 6),
        "--workers", 8 if torch.cuda.is_available() else 0,
    ]  # fmt: skip
    command += ["--gradient_checkpointing"] if recompute else []
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the plain loop failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def already(case: str) -> bool:
    """Whether the results have this case with this device, these versions and this commit."""
    file, here = RESULTS / "throughput.jsonl", circumstances()
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return any(line["case"] == case and all(line[key] == value for key, value in here.items()) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--no_plain", action="store_true", help="without the plain loop")
    parser.add_argument("--again", action="store_true", help="also if the results have this case already")
    args = parser.parse_args()
    if already(args.case) and not args.again:
        print(f"{args.case}: measured already with this commit (--again measures again)")
        return
    case = CASES[args.case]
    assert case.size in SIZES
    audio, text = make_bases(args.output_dir / "bases", case.size, args.tokenizer)
    data = make_data(args.output_dir / "data", min(1024, (case.steps + COUNTED_STEPS) * case.batch))
    beside = {} if args.no_plain or case.plain is None else plain(case, audio, text, data)
    found = measure(case, audio, text, data, args.output_dir / f"run-{args.case}-{time.strftime('%H%M%S')}")
    if beside:
        found["plain_samples_s"], found["plain_max_reserved_gib"] = beside["samples_s"], beside["max_reserved_gib"]
        found["ratio"] = round(found["samples_s"] / beside["samples_s"], 2)
    append_result("throughput", {"case": args.case, **found})


if __name__ == "__main__":
    main()
