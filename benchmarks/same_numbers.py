"""Proves that a refactoring changes no number: an old commit and this tree train and answer alike, to the last bit.

    python benchmarks/same_numbers.py HEAD~1 --scratch DIR
    python benchmarks/same_numbers.py HEAD~1 --scratch DIR --steps 2 --cases demo/stable    # a quick try

The old commit is checked out into a temporary git worktree. Its code and the code of the tree in which this script lies
run at the same time on the same machine, because other CPUs give other bits. Both are used only through `python -m
qwhisper train|eval|verify|data check` and the files that these write, so modules may move between the two. For every
case it compares

- losses, gradient norms and all other numbers of metrics.jsonl except times (floats stand there with all digits);
- the SHA-256 of every tensor in the checkpoints after a fifth, half and all of the steps: the trained weights, and what
  a resume needs (optimizer, generators, snapshots);
- the numbers of events.jsonl and quarantine.jsonl, and the counts that `verify` prints;
- scores and greedy answers of `eval`;
- the second half of the old run with the same, resumed from the old checkpoint by this tree's code;
- exit code and output of `data check` on sound and on faulty data, with and without the models.

What the old code writes must be there and equal. What only this tree writes is counted (`added`), and is no difference.

Cases: two pairs of bases × four ways of training, and `data` for `data check`. `demo` has bases of `qwhisper demo`:
those of a finished demo with --demo_output, otherwise bases of the same architecture made here in fewer steps, which
takes some minutes. `tiny.en` has Whisper tiny.en and a random Qwen3 with the real tokenizer, from --models. `stable` is
the default recipe with a learning rate at which small models learn, `keep-thinking` the recipe of that name with
dropout and a process that reads the data, `no-clamp` is `stable` without the activation clamp, which adds gradients in
another order where the first decoder layer's input is read, `4bit` is `stable` with --load_in_4bit and dropout. A
silent clip in the training data makes every whole run drop and quarantine a sample.

--scratch keeps what is made: a second call finds the bases and data there, and replaces the runs.

Prints one JSON line a case and quantity (--record appends them to results/same_numbers.jsonl), and at the end `equal`,
or the first difference; exit code 0 or 1. Everything runs on the CPU.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: circumstances() then names the CPU, which is what runs

import torch
from common import ROOT, append_result, as_arguments, circumstances
from safetensors import safe_open
from same_inputs import Inputs, make_inputs
from transformers.utils import logging as hf_logging

BATCH, SEED = 8, 3
RATES = {"--learning_rate": 2e-3, "--projector_learning_rate": 2e-3}
WAYS: dict[str, dict[str, object]] = {
    "stable": RATES,
    "keep-thinking": {
        "--config": "keep-thinking",
        "--gradient_accumulation_steps": 2,
        "--per_device_train_batch_size": BATCH // 2,
        "--projector_dropout": 0.2,
        "--warmup_steps": 4,
        "--dataloader_num_workers": 1,
    },
    "no-clamp": RATES | {"--activation_clamp": "off"},
    "4bit": RATES | {"--load_in_4bit": True, "--lora_dropout": 0.1},
}
BASES = ("demo", "tiny.en")
CASES = [f"{bases}/{way}" for bases in BASES for way in (*WAYS, "data")]
# Values that depend on the machine, not on the arithmetic.
TIMES = {"time", "seconds", "peak_memory_gib"}
NOT_WEIGHTS = ("optimizer.safetensors", "generators.safetensors", "snapshots.safetensors")

Values = dict[str, Any]  # where it stands -> the value
Quantities = dict[str, Values]


# ---------------------------------------------------------------- One tree, one case


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as scratch:
        folder = Path(scratch) / "old"
        git("worktree", "add", "--detach", "--quiet", str(folder), commit)
        try:
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder))


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def python(tree: Path, cwd: Path, *arguments: object) -> subprocess.CompletedProcess:
    """`python …` in the folder `cwd` with the code of `tree`, without a network."""
    settings = {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=os.environ | settings, capture_output=True, text=True
    )


def qwhisper(tree: Path, cwd: Path, *arguments: object) -> str:
    """Runs a command that must succeed; returns its standard output."""
    done = python(tree, cwd, "-m", "qwhisper", *arguments)
    if done.returncode:
        command = " ".join(["qwhisper", *map(str, arguments)])
        raise SystemExit(
            f"{tree}: exit code {done.returncode} of {command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def check_tree(tree: Path) -> None:
    """Raises SystemExit if another installation of the package would run in place of this tree."""
    found = python(tree, tree.parent, "-c", "import qwhisper; print(qwhisper.__file__)").stdout.strip()
    if not Path(found).resolve().is_relative_to(tree.resolve()):
        raise SystemExit(f"with PYTHONPATH={tree} Python imports qwhisper from {found or 'nowhere'}")


def run_case(tree: Path, inputs: Inputs, way: str, steps: int, folder: Path) -> Quantities:
    """Trains into `folder`/run and evaluates; all that is compared but the resumed run."""
    folder.mkdir(parents=True)
    run, report = folder / "run", folder / "eval.json"
    flags = {"--per_device_train_batch_size": BATCH, "--gradient_accumulation_steps": 1} | inputs.flags | WAYS[way]
    qwhisper(
        tree, folder, "train", "--train_file", inputs.data / "train.jsonl", "--eval_file", inputs.data / "eval.jsonl",
        "--audio_model", inputs.audio_model, "--text_model", inputs.text_model, "--output_dir", "run",
        "--max_steps", steps, "--save_steps", max(1, steps // 10), "--save_total_limit", 20, "--seed", SEED,
        "--eval_steps", max(1, steps // 2), *as_arguments(flags),
    )  # fmt: skip
    verified = qwhisper(tree, folder, "verify", "run")
    qwhisper(
        tree, folder, "eval", "run", "--eval_file", inputs.data / "eval.jsonl", "--max_new_tokens", 8,
        "--output_json", report.name,
    )  # fmt: skip
    scores, answers = read_report(report)
    kept = [run / f"checkpoint-{step}" for step in sorted({max(1, steps // 5), max(1, steps // 2), steps})]
    return {
        **read_metrics(run),
        **read_weights(kept),
        "events": read_events(run),
        # Without the loss of its step: verify has no seed, and dropout changes it.
        "verify": dict(enumerate(re.findall(r"(?<![\d.])\d+(?![\d.])", verified.replace(str(folder), "")))),
        "scores": scores,
        "answers": answers,
    }


def resume(tree: Path, old_run: Path, steps: int, folder: Path) -> Quantities:
    """The second half of the old run, repeated by `tree` from the old run's checkpoint in its middle."""
    run = folder / "run"
    shutil.copytree(old_run, run)
    for checkpoint in run.glob("checkpoint-*"):
        if int(checkpoint.name.partition("-")[2]) > max(1, steps // 2):
            shutil.rmtree(checkpoint)
    (run / "metrics.jsonl").unlink()
    qwhisper(tree, folder, "train", "--config", "run/config.yaml", "--resume_from_checkpoint")
    return read_metrics(run) | read_weights([run / f"checkpoint-{steps}"])


# ---------------------------------------------------------------- Reading what a run wrote


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def read_metrics(run: Path) -> Quantities:
    found: Quantities = {"losses": {}, "gradient norms": {}, "other metrics": {}}
    for line in read_lines(run / "metrics.jsonl"):
        for name in line.keys() - TIMES - {"step"}:
            kind = "losses" if "loss" in name else "gradient norms" if "grad_norm" in name else "other metrics"
            found[kind][f"step {line['step']}: {name}"] = line[name]
    return {kind: dict(sorted(values.items(), key=by_step)) for kind, values in found.items()}


def by_step(item: tuple[str, Any]) -> tuple[int, str]:
    return int(item[0].split()[1].rstrip(":")), item[0]


def read_weights(checkpoints: list[Path]) -> Quantities:
    """SHA-256 of each tensor's bytes, dtype and shape."""
    weights: Values = {}
    rest: Values = {}
    for checkpoint in checkpoints:
        for file in sorted(checkpoint.rglob("*.safetensors")):
            into = rest if file.name in NOT_WEIGHTS else weights
            with safe_open(file, framework="pt") as tensors:
                for name in sorted(tensors.keys()):
                    where = f"{checkpoint.name}/{file.relative_to(checkpoint)}: {name}"
                    into[where] = tensor_sha256(tensors.get_tensor(name))
    return {"weights": weights, "optimizer": rest}


def tensor_sha256(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + data).hexdigest()


def read_events(run: Path) -> Values:
    """Kind, step and numbers of each event, and which sample was quarantined when; words may change."""
    found: Values = {}
    for index, event in enumerate(read_lines(run / "events.jsonl")):
        found[f"event {index}: kind"] = event["kind"]
        found |= {f"event {index}: {name}": value for name, value in leaves(event) if not isinstance(value, str)}
    for index, sample in enumerate(read_lines(run / "quarantine.jsonl")):
        found[f"quarantined {index}"] = [sample["id"], sample["step"]]
    return found


def read_report(file: Path) -> tuple[Values, Values]:
    """Numbers and answers of `eval --output_json`."""
    report = json.loads(file.read_text(encoding="utf-8"))
    answers = {
        f"{answer['id']} turn {answer['turn']}: {name}": value
        for answer in report.pop("answers")
        for name, value in answer.items()
    }
    return {name: value for name, value in leaves(report) if not isinstance(value, str)}, answers


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in nested lists and dictionaries, times left out."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in TIMES:
                yield from leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def check_data(tree: Path, inputs: Inputs) -> Values:
    """Exit code, output and messages of `data check`, with and without the models' flags."""
    models = ["--text_model", inputs.text_model, "--audio_model", inputs.audio_model, "--max_length", 100]
    found: Values = {}
    for file in ("train.jsonl", "faulty.jsonl"):
        for more in ([], models):
            done = python(tree, inputs.data, "-m", "qwhisper", "data", "check", file, *more)
            name = f"{file}{' with models' if more else ''}"
            lines = [done.returncode, *done.stdout.splitlines(), *done.stderr.splitlines()]
            found |= {f"{name}, line {number}": line for number, line in enumerate(lines)}
    return found


# ---------------------------------------------------------------- Comparing


def first_difference(old: Values, new: Values) -> str | None:
    """The first value of `old` that `new` lacks or has otherwise, in words; bits count: 0.0 is not -0.0."""
    if not old:
        return "nothing was written by the old code"
    for where, value in old.items():
        if where not in new:
            return f"{where} is {json.dumps(value)} in the old code and missing in the new"
        if json.dumps(value) != json.dumps(new[where]):
            return f"{where} is {json.dumps(value)} in the old code, {json.dumps(new[where])} in the new"
    return None


def digest(values: Values) -> str:
    return hashlib.sha256(json.dumps(list(values.items())).encode()).hexdigest()


def compare(case: str, old: Quantities, new: Quantities, settings: dict, record: bool) -> list[str]:
    """Prints a line for each quantity of the case; returns the differences."""
    differences = []
    for quantity, values in old.items():
        found = new.get(quantity, {})
        difference = first_difference(values, found)
        line = {"case": case, "quantity": quantity, "equal": difference is None, "values": len(values)}
        line |= {"added": len(found.keys() - values.keys()), "sha256": digest(values)}
        if difference:
            line["first_difference"] = difference
            differences.append(f"{case}, {quantity}: {difference}")
        if record:
            append_result("same_numbers", line | settings)
        else:
            print(json.dumps(line | settings | circumstances()), flush=True)
    return differences


def measure(case: str, trees: dict[str, Path], inputs: Inputs, steps: int, folder: Path) -> list[Quantities]:
    """The case's quantities by each tree's code."""
    way = case.split("/")[1]
    with ThreadPoolExecutor(len(trees)) as pool:
        if way == "data":
            return [{"data check": found} for found in pool.map(lambda tree: check_data(tree, inputs), trees.values())]
        runs = [pool.submit(run_case, tree, inputs, way, steps, folder / name) for name, tree in trees.items()]
        old, new = (run.result() for run in runs)
    if steps > 1:
        for name, values in resume(trees["new"], folder / "old/run", steps, folder / "resumed").items():
            # Of the old run, what a resumed one has: the steps after its checkpoint, and the last checkpoint.
            old[f"resumed: {name}"] = {where: v for where, v in old[name].items() if in_second_half(where, steps)}
            new[f"resumed: {name}"] = values
    return [old, new]


def in_second_half(where: str, steps: int) -> bool:
    step = int(re.search(r"\d+", where)[0])
    return step == steps if where.startswith("checkpoint-") else step > max(1, steps // 2)


def absolute(path: str) -> Path:
    return Path(path).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old_commit", help="what this tree is compared with, such as HEAD~1 or a tag")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--demo_output", type=absolute, help="--output_dir of a finished `qwhisper demo`")
    parser.add_argument("--models", type=absolute, default=ROOT.parent / "shared/models",
                        help="folder with whisper-tiny.en and qwen3-tokenizer (default: ../shared/models)")  # fmt: skip
    parser.add_argument("--scratch", type=absolute, help="folder for inputs and runs (default: one that is removed)")
    parser.add_argument("--record", action="store_true", help="append the lines to results/same_numbers.jsonl")
    args = parser.parse_args()
    hf_logging.disable_progress_bar()
    settings = {"steps": args.steps, "batch": BATCH, "old_commit": git("rev-parse", "--short", args.old_commit)}
    settings |= {"uncommitted": bool(git("status", "--porcelain", "--untracked-files=no"))}
    differences = []
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as temporary, worktree(args.old_commit) as old_tree:
        scratch = args.scratch or Path(temporary)
        trees = {"old": old_tree, "new": ROOT}
        for tree in trees.values():
            check_tree(tree)
        for case in args.cases:
            inputs = make_inputs(scratch / "inputs", args.demo_output, args.models, case.split("/")[0])
            shutil.rmtree(scratch / case, ignore_errors=True)
            old, new = measure(case, trees, inputs, args.steps, scratch / case)
            differences += compare(case, old, new, settings, args.record)
    print(f"different: {differences[0]}" if differences else "equal")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
