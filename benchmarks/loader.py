"""How fast data workers give samples, and how long a step waits for them.

    python benchmarks/loader.py --tokenizer DIR --output_dir DIR --workers 1 2 --batch 128
    python benchmarks/loader.py --tokenizer DIR --output_dir DIR --workers 8 --batch 4 --step_ms 25

The data of throughput.py: noise of 1 to 30 s in FLAC. The trainer does what it does in `qwhisper train`: a thread takes
a step from the workers and builds its packs, of at most 8192 tokens, in pinned memory if there is a GPU.

- samples_s: as fast as they come. With --step_ms each step takes that long, as if a GPU worked, and `wait_ms` is what
  the next one then waits for its samples; the first steps are left out.
- worker_ms, trainer_ms: processor time of the workers and of the trainer for one sample. workers_for_335 and _650: how
  many workers that many samples a second need, by worker_ms alone.
"""

import argparse
import math
import resource
import time
from collections.abc import Generator
from pathlib import Path

import torch
from common import append_result
from real_shapes import make_data
from transformers import AutoTokenizer

from qwhisper.data.ahead import one_ahead
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.loader import StepSamples, step_samples
from qwhisper.data.packing import plan_packs
from qwhisper.data.processes import Poll, nothing
from qwhisper.data.source import ShuffledDialogues
from qwhisper.engine.batch import packed_batch
from qwhisper.engine.prefetch import HostBatches
from qwhisper.frames import DEFAULT_LEAD_SILENCE_S, DEFAULT_TAIL_SILENCE_S, FrameArithmetic
from qwhisper.model.processing_qwen3_audio import add_audio_token

TOKENS = 8192
GOALS = (335, 650)


def processor_s(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def measure(encoder: DialogueEncoder, source: ShuffledDialogues, workers: int, steps: int, step_ms: float) -> dict:
    batches = HostBatches(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    building: list[float] = []

    def make(pack):
        return packed_batch(pack, encoder.frames, encoder.audio_token_id)

    def packs_of(samples):
        lengths = [len(sample.input_ids) for sample in samples]
        return [[samples[i] for i in pack] for pack in plan_packs(lengths, TOKENS)]

    def prepared(poll: Poll) -> Generator[StepSamples]:
        for step in step_samples(source, encoder, num_workers=workers, poll=poll):
            begun = time.perf_counter()
            packs = packs_of(step.samples)
            batches.prepare(packs, make)
            building.append((time.perf_counter() - begun) / len(packs))
            yield step

    skip = 2 + 2 * workers  # steps that were read while the first ones were awaited
    samples, waits, children = 0, [], processor_s(resource.RUSAGE_CHILDREN)
    with one_ahead(prepared, nothing) as stream:
        for number in range(skip + steps):
            asked = time.perf_counter()
            step = next(stream)
            if number >= skip:
                waits.append(time.perf_counter() - asked)
                samples += len(step.samples)
            for pack in packs_of(step.samples):
                batches.take(pack, make)
            time.sleep(step_ms / 1000)
            if number == skip - 1:
                begun, here = time.perf_counter(), processor_s(resource.RUSAGE_SELF)
        seconds, here = time.perf_counter() - begun, processor_s(resource.RUSAGE_SELF) - here
    read = (skip + steps + 2 * workers) * source.samples_per_step  # with those that were read for nothing
    worker_s = (processor_s(resource.RUSAGE_CHILDREN) - children) / read
    return {
        "samples_s": round(samples / seconds, 1),
        "wait_ms": round(1000 * sum(waits) / len(waits), 2),
        "pack_ms": round(1000 * sum(building[skip:]) / len(building[skip:]), 2),
        "worker_ms": round(1000 * worker_s, 2),
        "trainer_ms": round(1000 * here / samples, 3),
        **{f"workers_for_{goal}": math.ceil(goal * worker_s) for goal in GOALS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--step_ms", type=float, default=0.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = make_data(args.output_dir / "data", 256)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    frames = FrameArithmetic(lead_silence_s=DEFAULT_LEAD_SILENCE_S, tail_silence_s=DEFAULT_TAIL_SILENCE_S)
    encoder = DialogueEncoder(tokenizer, frames, audio_token_id=add_audio_token(tokenizer))
    source = ShuffledDialogues(dialogues=read_dialogues(str(data)), samples_per_step=args.batch, seed=0)
    for workers in args.workers:
        found = measure(encoder, source, workers, args.steps, args.step_ms)
        append_result("loader", {"workers": workers, "batch": args.batch, "step_ms": args.step_ms, **found})


if __name__ == "__main__":
    main()
