"""Samples a second of `qwhisper train` with shipped recipes, beside a plain loop; one case a call.

    python benchmarks/throughput.py --tokenizer DIR --output_dir DIR --case 0.6b --starts 2

Guards, probe, log, checkpoints and loader are on. Real shapes and random weights, noise of 1 to 30 s (real_shapes.py).
At most 30.0 GiB may be reserved on the card, 12 and 20 with the smaller models in 4 bits (throughput_cases.py). Each
training is a new process; the plain loop (plain_loop.py) runs in the same call on the same clips; --no_plain leaves it
out. `bases`, `data`, `features` and `compiled` in the output folder are used again by later calls.

- samples_s: over whole steps, the first ones left out; slowest_step: the slowest of them divided by the median.
- gpu_busy: the kernels' time of a profiled step, overlaps counted once, divided by the time of a step that is not
  profiled; profile-CASE.txt in the output folder has the kernels. launches_per_pack: of kernels, graphs and copies.
- useful_tflops: see `useful_flops`; no padding, no recompute. matmul_peak_tflops: bf16, measured in the same call.
- fill_tokens, fill_frames: real tokens and encoder frames ÷ computed ones, over the packs from the first timed step on.
- first_step_s: from the start of the process to the end of the first optimizer step. With --starts 2 a short run comes
  first, so that the compilers' caches on the disk are warm; cold_first_step_s is that run's. compile_s: compiling and
  recording of passes, by the run's own events.
- resumed cases: samples_s of the resumed run, samples_s_before of the run before.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import RESULTS, append_result, circumstances
from real_shapes import SIZES, make_bases, make_data
from throughput_cases import CASES, Case
from throughput_meter import PROFILED_STEPS, Meter, figures, speed

from qwhisper.commands import VERBS
from qwhisper.parsing import parse
from qwhisper.report.events import read_jsonl
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.run import main as train

MOST_CLIPS = 1024
START_STEPS = 2  # of a run that only warms the caches


def flags_of(case: Case, folder: Path, bases: tuple[Path, Path], data: Path, more: list[str]) -> list[str]:
    """The command line of `train` without the run's folder and length. more: flags that come last."""
    features = [flag.format(features=folder / "features") for flag in case.flags]
    flags = [
        "--config", case.recipe, "--train_file", data, "--audio_model", bases[0], "--text_model", bases[1],
        "--per_device_train_batch_size", case.batch, "--gradient_accumulation_steps", case.accumulate,
        "--num_train_epochs", 1000, "--dataloader_num_workers", 8 if torch.cuda.is_available() else 0,
        "--execution", "captured", *features, *more,  # `auto` would run these few steps plain
    ]  # fmt: skip
    return [str(flag) for flag in flags]


def measure(case: Case, flags: list[str], task: str, began: float, found_file: Path) -> None:
    """Train in this process and write what was measured to `found_file`.

    task: `start` (few steps), `fill` (one pass over the data), `before` (of a resume) or `measure`.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.most_gib * 2**30 / total))
    skip = max(1, case.steps // 3)
    meter = Meter(skip, case.steps, began)
    code = train(parse("train", VERBS["train"], TrainArguments, flags), [meter])
    assert code == 0, f"the training ended with exit code {code}"
    if task == "measure":
        found = figures(meter, case.samples, encoded=not case.caches_features)
        if on_gpu:
            profile = meter.top_kernels()
            found_file.with_suffix(".txt").write_text(profile + "\n", encoding="utf-8")
            print(profile, flush=True)
    else:
        found = speed(meter, case.samples) if task == "before" else {"first_step_s": round(meter.first_step_s, 1)}
    found_file.write_text(json.dumps(found), encoding="utf-8")


def in_new_process(args: argparse.Namespace, flags: list[str], task: str, run: Path, steps: int) -> dict:
    """What `measure` finds in a process that uses the output folder's compiler caches; its output passes through."""
    found_file = args.output_dir / f"found-{args.case}.json"
    found_file.unlink(missing_ok=True)
    compiled = args.output_dir / "compiled"
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
    }
    job = {"task": task, "began": time.monotonic(), "found": str(found_file)}
    job["flags"] = [*flags, "--output_dir", str(run), "--max_steps", str(steps)]
    print(f"{args.case}, {task}: qwhisper train {shlex.join(job['flags'])}", flush=True)
    own = ["--tokenizer", args.tokenizer, "--output_dir", args.output_dir, "--case", args.case]
    command = [sys.executable, __file__, *map(str, own), "--job", json.dumps(job)]
    done = subprocess.run(command, env=os.environ | caches)
    if done.returncode:
        raise SystemExit(f"{args.case}: the training failed ({task}), exit code {done.returncode}")
    return json.loads(found_file.read_text(encoding="utf-8"))


def product(args: argparse.Namespace, case: Case, flags: list[str], num_clips: int) -> dict:
    """All runs of the product that the case needs, and what they found."""
    stem = args.output_dir / f"run-{args.case}-{time.strftime('%H%M%S')}"
    last, more = case.steps + PROFILED_STEPS, {}
    if case.caches_features:
        in_new_process(args, flags, "fill", Path(f"{stem}-fill"), max(START_STEPS, -(-num_clips // case.samples)))
    for number in range(1, args.starts):
        started = in_new_process(args, flags, "start", Path(f"{stem}-start{number}"), START_STEPS)
        more.setdefault("cold_first_step_s", started["first_step_s"])
    if case.resumed:
        before = in_new_process(args, flags, "before", stem, case.steps)
        more["samples_s_before"] = before["samples_s"]
        flags, last = [*flags, "--resume_from_checkpoint"], last + case.steps
    found = in_new_process(args, flags, "measure", stem, last)
    return found | more | {"starts": args.starts, "steps": case.steps} | execution_of(stem)


def execution_of(run: Path) -> dict[str, object]:
    """How the run's packs were executed, and the seconds that preparing it took, by the run's events."""
    events = read_jsonl(run / "events.jsonl")
    executed = [event["execution"] for event in events if event["kind"] == "executes"]
    spent = sum(event["seconds"] for event in events if event["kind"] == "prepared")
    return {"execution": executed[-1] if executed else "plain", "compile_s": round(spent, 1)}


def plain(case: Case, bases: tuple[Path, Path], data: Path) -> dict:
    """The result of the plain loop, run in a new process so that it has the whole memory of the card."""
    assert case.plain is not None
    batch, accumulate, recompute = case.plain
    command = [
        sys.executable, Path(__file__).with_name("plain_loop.py"), "--audio_model", bases[0], "--text_model", bases[1],
        "--train_file", data, "--batch", batch, "--accumulate", accumulate,
        "--steps", max(3, min(case.steps, 30) // 2), "--skip", max(1, min(case.steps, 30) // 6),
        "--workers", 8 if torch.cuda.is_available() else 0,
    ]  # fmt: skip
    command += ["--gradient_checkpointing"] if recompute else []
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the plain loop failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def already(case: str, more: str) -> bool:
    """Whether the results have this case with these flags, this device, these versions and this commit."""
    file, here = RESULTS / "throughput.jsonl", circumstances()
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    same = [line for line in lines if line["case"] == case and line.get("more_flags", "") == more]
    return any(all(line[key] == value for key, value in here.items()) for line in same)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--no_plain", action="store_true", help="without the plain loop")
    parser.add_argument("--again", action="store_true", help="also if the results have this case already")
    parser.add_argument("--starts", type=int, default=1, help="2: a short run first, for warm compiler caches")
    parser.add_argument("--more_flags", default="", help="flags of train that come last, such as '--execution plain'")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)  # for the processes that it starts
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    case = CASES[args.case]
    assert case.size in SIZES
    if args.job:
        measure(case, args.job["flags"], args.job["task"], args.job["began"], Path(args.job["found"]))
        return
    if already(args.case, args.more_flags) and not args.again:
        print(f"{args.case}: measured already with this commit (--again measures again)")
        return
    began = time.perf_counter()
    args.output_dir = args.output_dir.resolve()
    bases = make_bases(args.output_dir / "bases", case.size, args.tokenizer, nf4=case.nf4_base)
    clips = min(MOST_CLIPS, (case.steps + PROFILED_STEPS) * case.samples)
    data = make_data(args.output_dir / "data", clips, longest_s=case.longest_s, most_turns=case.most_turns)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the making of the bases took belongs to the runs
    print(f"{args.case}: bases and data in {time.perf_counter() - began:.0f} s", flush=True)
    beside = {} if args.no_plain or case.plain is None else plain(case, bases, data)
    print(f"{args.case}: the plain loop: {beside}", flush=True)
    flags = flags_of(case, args.output_dir, bases, data, shlex.split(args.more_flags))
    found = product(args, case, flags, clips)
    profile = args.output_dir / f"found-{args.case}.txt"
    if profile.exists():
        profile.replace(args.output_dir / f"profile-{args.case}.txt")
    if beside:
        found["plain_samples_s"], found["plain_max_reserved_gib"] = beside["samples_s"], beside["max_reserved_gib"]
        found["ratio"] = round(found["samples_s"] / beside["samples_s"], 2)
    more = {"more_flags": args.more_flags} if args.more_flags else {}
    append_result("throughput", {"case": args.case} | found | more | {"wall_s": round(time.perf_counter() - began)})


if __name__ == "__main__":
    main()
