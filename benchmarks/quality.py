"""What faster execution costs in quality: the same training plain in bf16 and with each of the faster ways.

    python benchmarks/quality.py --task digits real_lm --audio_model DIR --tokenizer DIR --data DIR --output_dir DIR \
        --text_model DIR --minutes 9

digits is spoken_digits.py, real_lm is real_lm.py with the recipe `recommended`, which needs --text_model. Every variant
of a seed starts from the same models and weights and sees the same dialogues in the same order; another speaker is
never heard with each seed. One JSON line for each task, variant and seed in results/quality.jsonl, with the answers
that were right, one character each; quality_report.py compares them. A call goes on where the last one stopped, starts
nothing that would not end within --minutes, and runs --at_once trainings beside each other on the card.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import real_lm
import spoken_digits
from common import RESULTS, append_result, circumstances
from quality_report import EVAL_SPEAKERS, TASKS, VARIANTS

Job = tuple[str, int, str | None]  # task, seed, variant; None: make the models and data
PLAIN = ("--execution", "plain")
FLAGS = {  # of `train`; {features} stands for a folder of the task and seed
    "plain": PLAIN,
    "captured": ("--execution", "captured"),
    "cached": (*PLAIN, "--feature_cache", "{features}"),
    "fp8": (*PLAIN, "--load_in_fp8"),
    "nf4": (*PLAIN, "--load_in_4bit"),
}


class Digits:
    """spoken_digits.py with one seed."""

    def __init__(self, args: argparse.Namespace, seed: int):
        heard = ",".join(speaker for speaker in EVAL_SPEAKERS if speaker != EVAL_SPEAKERS[seed])
        self.folder = args.output_dir / f"digits-{seed}"
        own = [
            "--audio_model", args.audio_model, "--tokenizer", args.tokenizer, "--data", args.data,
            "--train_speakers", heard, "--eval_speakers", EVAL_SPEAKERS[seed], "--seed", seed,
            "--output_json", self.folder / "scores.json", "--cache_dir", args.output_dir / "digits-bases",
            *steps_of(args),
        ]  # fmt: skip
        self.args = spoken_digits.parse(list(map(str, own)))

    def prepare(self) -> None:
        spoken_digits.text_base(self.args)
        if not (self.folder / "eval.jsonl").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            spoken_digits.write_data(self.args, self.folder)

    def run(self, run: Path, flags: list[str]) -> tuple[dict, float]:
        files = (self.folder / "train.jsonl", self.folder / "eval.jsonl")
        return spoken_digits.learn(self.args, spoken_digits.text_base(self.args), files, run, flags)


class RealLm:
    """real_lm.py with the recommended recipe and one seed."""

    def __init__(self, args: argparse.Namespace, seed: int):
        self.folder, self.speaker = args.output_dir / "real_lm", EVAL_SPEAKERS[seed]
        own = [
            "--text_model", args.text_model, "--audio_model", args.audio_model, "--data", args.data,
            "--output_dir", self.folder, "--eval_speaker", self.speaker, "--seed", seed, *steps_of(args),
        ]  # fmt: skip
        self.args = real_lm.parse(list(map(str, own)))

    def prepare(self) -> None:
        real_lm.prepare(self.args, self.speaker, self.text_model())

    def text_model(self) -> Path:
        return real_lm.plain_folder(self.args.text_model, self.folder)

    def run(self, run: Path, flags: list[str]) -> tuple[dict, float]:
        text_model = self.text_model()
        data = real_lm.prepare(self.args, self.speaker, text_model)
        folder, seconds = real_lm.train(self.args, "recommended", text_model, data, run, flags)
        return real_lm.evaluate(self.args, data, folder), seconds


KINDS: dict[str, Callable[[argparse.Namespace, int], Digits | RealLm]] = {"digits": Digits, "real_lm": RealLm}
assert set(KINDS) == set(TASKS) and set(FLAGS) == set(VARIANTS)


def steps_of(args: argparse.Namespace) -> list[object]:
    return ["--steps", args.steps] if args.steps else []


def line_of(result: dict) -> dict:
    """What is kept of the report of `qwhisper eval`."""
    right = [answer["right"] for answer in result["answers"]]
    return {
        "accuracy": round(sum(right) / len(right), 5),
        "loss": result["loss"],
        "kinds": {kind: round(scores["turns"], 4) for kind, scores in result["kinds"].items()},
        "right": "".join("01"[answer] for answer in right),
    }


def do(args: argparse.Namespace, task: str, seed: int, variant: str | None, found_file: Path) -> None:
    """Prepare the models and data of a task and seed (variant None), or train and evaluate a variant."""
    kind = KINDS[task](args, seed)
    found: dict = {}
    if variant is None:
        kind.prepare()
    else:
        run = args.output_dir / f"run-{task}-{variant}-{seed}-{time.strftime('%H%M%S')}"
        features = args.output_dir / f"features-{task}-{seed}"
        flags = [flag.format(features=features) for flag in FLAGS[variant]]
        began = time.perf_counter()
        result, train_seconds = kind.run(run, flags)
        found = {"task": task, "variant": variant, "seed": seed, "eval_speaker": EVAL_SPEAKERS[seed]}
        found |= line_of(result) | {"flags": flags, "steps": kind.args.steps, "batch": kind.args.batch}
        found |= {"train_seconds": round(train_seconds, 1), "seconds": round(time.perf_counter() - began, 1)}
    found_file.write_text(json.dumps(found), encoding="utf-8")


class Jobs:
    """Runs each job in a new process, at most `at_once` at a time, as long as the minutes last."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.began, self.longest = args, time.monotonic(), 0.0

    def all(self, jobs: Sequence[Job], then: Callable[[dict], None]) -> list[Job]:
        """Run all; `then` gets what each has found, in this process. Returns the jobs that are done."""
        done = []
        with ThreadPoolExecutor(self.args.at_once) as pool:
            for job, found in zip(jobs, pool.map(self.one, jobs), strict=True):
                if found is not None:
                    then(found)
                    done.append(job)
        return done

    def one(self, job: Job) -> dict | None:
        """What the job has found; None if it failed or was not started."""
        begun, (task, seed, variant) = time.monotonic(), job
        if begun - self.began + self.longest > 60 * self.args.minutes:
            return None
        name = f"{task}-{variant or 'prepare'}-{seed}"
        log, found_file = self.args.output_dir / f"{name}.log", self.args.output_dir / f"{name}.json"
        found_file.unlink(missing_ok=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--job", json.dumps([*job, str(found_file)])]
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        spent = time.monotonic() - begun
        self.longest = max(self.longest, spent)
        print(f"{name}: {'failed' if code else 'done'} after {spent:.0f} s", flush=True)
        if code:
            print("\n".join(log.read_text(encoding="utf-8").splitlines()[-15:]), flush=True)
            return None
        return json.loads(found_file.read_text(encoding="utf-8"))


def missing(args: argparse.Namespace) -> list[Job]:
    """What the results don't have yet with this device, these versions and this commit; plain runs first."""
    file, here = RESULTS / "quality.jsonl", circumstances()
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    same = [line for line in lines if all(line[key] == value for key, value in here.items())]
    done = {(line["task"], line["seed"], line["variant"]) for line in same}
    wanted: list[Job] = [(task, seed, variant) for task in args.task for variant in args.variant for seed in args.seeds]
    return [job for job in wanted if job not in done]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=["digits"])
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], choices=range(len(EVAL_SPEAKERS)))
    parser.add_argument("--audio_model", type=Path, required=True, help="folder of a Whisper encoder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of Qwen3's tokenizer, for digits")
    parser.add_argument("--text_model", type=Path, default=None, help="for real_lm")
    parser.add_argument("--data", type=Path, required=True, help="folder of DIGIT_SPEAKER_TAKE.wav")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=None, help="of each training (default: the task's own)")
    parser.add_argument("--at_once", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)  # for the processes that it starts
    args = parser.parse_args()
    if "real_lm" in args.task and args.text_model is None:
        parser.error("--task real_lm needs --text_model")
    for name in ("audio_model", "tokenizer", "text_model", "data", "output_dir"):
        path = getattr(args, name)
        setattr(args, name, path and path.resolve())  # `qwhisper` runs in the repository's folder
    return args


def main() -> None:
    args = parse()
    if args.job:
        task, seed, variant, found_file = args.job
        do(args, task, seed, variant, Path(found_file))
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    jobs, wanted = Jobs(args), missing(args)
    if any(task == "real_lm" for task, _, _ in wanted):
        RealLm(args, 0).text_model()  # once, for all jobs
    first: list[Job] = list(dict.fromkeys((task, seed, None) for task, seed, _ in wanted))
    prepared = jobs.all(first, lambda found: None)
    ready = [job for job in wanted if (*job[:2], None) in prepared]
    jobs.all(ready, lambda found: append_result("quality", found))
    print(f"{len(missing(args))} runs are left", flush=True)


if __name__ == "__main__":
    main()
