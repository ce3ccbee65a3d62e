"""A real instruct LM learns to hear digits from some speakers and is tested on another, also on kinds of question that
it was never trained on.

    python benchmarks/real_lm.py --text_model DIR --audio_model DIR --data DIR --output_dir DIR --recipe lora

Trained on: which digit a clip says, and which of two came last; some recipes add instructions of the shipped pool,
whose answers the LM itself has written from the words. Never trained on: sums, comparisons, translation …, which the LM
can answer when it reads the words. Retention is its score there on speech, as a share of its score on the words.
Goes through `qwhisper data answer`, `qwhisper train` and `qwhisper eval`. A folder with one GGUF file is turned into an
ordinary model folder first. The data of a speaker and seed is made once, and used again by the next recipe.
"""

import argparse
import json
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from augment import write_altered, write_synthesised
from common import DIGITS, SILENCE, append_result, as_arguments, as_settings, audio_part, pick, qwhisper, recordings
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qwhisper.data.instructions import instruction_pool
from qwhisper.demo.dialogues import write_jsonl

SPANISH = ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve")
# kind: (clips, question, the right answer from the digits)
QUESTIONS: dict[str, tuple[int, str, Callable[..., object]]] = {
    "clip": (1, "Which digit was said? Answer with one digit.", lambda a: a),
    "last": (2, "Which digit was said last? Answer with one digit.", lambda a, b: b),
    "sum": (2, "What do the two digits add up to? Answer with the number alone.", lambda a, b: a + b),
    "next": (1, "Which number comes right after this one? Answer with the number alone.", lambda a: a + 1),
    "double": (1, "Double this number. Answer with the number alone.", lambda a: 2 * a),
    "larger": (
        2,
        "Which of the two is the larger number? Answer with one word.",
        lambda a, b: DIGITS[max(a, b)],
    ),
    "over_five": (1, "Is this number greater than five? Answer yes or no.", lambda a: "yes" if a > 5 else "no"),
    "spanish": (1, "Translate this number into Spanish. Answer with one word.", lambda a: SPANISH[a]),
    "capitals": (1, "Write this word in capital letters. Answer with the word alone.", lambda a: DIGITS[a].upper()),
    "both": (
        2,
        "Say both words again. Answer with the two words alone.",
        lambda a, b: f"{DIGITS[a]} {DIGITS[b]}",
    ),
    "even": (1, "Is the digit even? Answer yes or no.", lambda a: "no" if a % 2 else "yes"),
}
TAUGHT = {"clip": 0.5, "last": 0.5}
# Instructions of the shipped pool that are too close to a kind that must not be trained on.
TOO_NEAR = re.compile(r"translate|repeat|number|word for word|write this down|language", re.IGNORECASE)
# Not the stable recipe's: a few hundred steps must do what it does in thousands. The warm-up is needed: the LM's first
# norm divides by the projector's small first outputs, so that gradients of some hundreds come early, and at the full
# rate one run of four never listened again after one.
FAST = {
    "--learning_rate": 2e-4,
    "--projector_learning_rate": 5e-4,
    "--projector_dropout": 0.5,
    "--warmup_steps": 40,
    "--early_lr_steps": 0,
    "--freeze_projector_steps": 0,
}
GENTLE = FAST | {"--learning_rate": 3e-5}
PROJECTOR = FAST | {"--use_lora": False}
DISTILLED = {"--distill_weight": 1.0}
HALF_DISTILLED = {"--distill_weight": 0.5}


@dataclass(frozen=True)
class Recipe:
    """The flags of each stage (a later one starts from the one before), and the shares of the samples in which an
    instruction is put beside speech, or stands with the words as text alone.
    """

    stages: tuple[dict[str, object], ...]
    spoken: float = 0.0
    typed: float = 0.0


RECIPES = {
    "stable": Recipe(({},)),
    "stable_high_rate": Recipe(({"--learning_rate": 2e-4},)),
    "stable_no_early_factor": Recipe(({"--early_lr_steps": 0},)),
    "stable_no_freeze": Recipe(({"--freeze_projector_steps": 0},)),
    "stable_full_init": Recipe(({"--lora_init_scale": 1.0},)),
    "lora": Recipe((FAST,)),
    "low_lora": Recipe((GENTLE,)),
    "few_targets": Recipe((FAST | {"--lora_target_modules": ["q_proj", "v_proj"]},)),
    "projector": Recipe((PROJECTOR,)),
    "two_stage": Recipe((PROJECTOR, GENTLE)),
    "rehearsal": Recipe((FAST,), typed=0.25),
    "distill": Recipe((FAST | HALF_DISTILLED,)),
    "projector_distill": Recipe((PROJECTOR | DISTILLED,)),
    "two_stage_distill": Recipe((PROJECTOR | DISTILLED, GENTLE | DISTILLED)),
    "instructions": Recipe((FAST,), spoken=0.5),
    "distill_instructions": Recipe((FAST | DISTILLED,), spoken=0.5),
    "projector_instructions": Recipe((PROJECTOR,), spoken=0.5),
    "projector_distill_instructions": Recipe((PROJECTOR | DISTILLED,), spoken=0.5),
    "recommended": Recipe(({"--config": "keep-thinking", "--projector_dropout": 0.5},), spoken=0.5),
    "two_stage_recommended": Recipe((PROJECTOR | HALF_DISTILLED, GENTLE | HALF_DISTILLED), spoken=0.5),
}


def dialogue(kind: str, id: str, generator: random.Random, files: dict) -> dict:
    count, question, right = QUESTIONS[kind]
    clips = [pick(generator, files) for _ in range(count)]
    content = [*(audio_part(*clip) for clip in clips), {"type": "text", "text": question}]
    answer = {"role": "assistant", "content": str(right(*(digit for digit, _ in clips))), "kind": kind}
    return {"id": id, "messages": [{"role": "user", "content": content}, answer]}


def taught_set(files: dict[str, dict], count: int, generator: random.Random) -> list[dict]:
    kinds = generator.choices(list(TAUGHT), list(TAUGHT.values()), k=count)
    return [dialogue(kind, f"t{i}", generator, files[generator.choice(sorted(files))]) for i, kind in enumerate(kinds)]


def instruction_set(files: dict[str, dict], count: int, generator: random.Random) -> list[dict]:
    """One clip or two and an instruction, without an answer."""
    pool = [line for line in instruction_pool("en") if not TOO_NEAR.search(line)]
    dialogues = []
    for index in range(count):
        digits = files[generator.choice(sorted(files))]
        clips = [audio_part(*pick(generator, digits)) for _ in range(generator.choice((1, 2)))]
        instruction = generator.choice(pool)
        content = clips + ([{"type": "text", "text": instruction}] if instruction else [])
        dialogues.append({"id": f"i{index}", "messages": [{"role": "user", "content": content, "kind": "instruction"}]})
    return dialogues


def typed(dialogue: dict) -> dict:
    """The same without sound: each clip's words in its place."""
    user, answer = dialogue["messages"]
    words = [part.get("transcript") or part["text"] for part in user["content"]]
    return {"id": f"{dialogue['id']}-typed", "messages": [user | {"content": " ".join(words)}, answer]}


def with_altered(digits: dict[int, list[Path]], folder: Path, copies: int, seed: int) -> dict[int, list[Path]]:
    """A speaker's recordings and `copies` altered ones of each."""
    groups = {digit: write_altered(files, folder, copies, seed) for digit, files in digits.items()}
    return {digit: [path for group in groups[digit] for path in group] for digit in digits}


def synthesised(folder: Path, count: int, seed: int) -> dict[int, list[Path]]:
    digits: dict[int, list[Path]] = {digit: [] for digit in range(10)}
    for word, path in write_synthesised(folder, count, seed):
        digits[DIGITS.index(word)].append(path)
    return digits


def evaluation_set(files: dict, kinds: list[str], each: int, generator: random.Random) -> list[dict]:
    return [dialogue(kind, f"{kind}{i}", generator, files) for kind in kinds for i in range(each)]


def plain_folder(text_model: Path, output_dir: Path) -> Path:
    """The model folder itself, or the one made of its GGUF file."""
    found = sorted(text_model.glob("*.gguf"))
    if (text_model / "config.json").exists() or not found:
        return text_model
    folder = output_dir / "text_model"
    if not (folder / "config.json").exists():
        print(f"dequantising {found[0].name} …", flush=True)
        AutoTokenizer.from_pretrained(text_model, gguf_file=found[0].name).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            text_model, gguf_file=found[0].name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.save_pretrained(folder)
    return folder


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_model", type=Path, required=True)
    parser.add_argument("--audio_model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of DIGIT_SPEAKER_TAKE.wav")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--eval_speaker", default=None, help="speaker never heard in training (default: the last by name)"
    )
    parser.add_argument("--steps", type=int, default=300 if torch.cuda.is_available() else 250)
    parser.add_argument("--batch", type=int, default=16 if torch.cuda.is_available() else 8)
    parser.add_argument(
        "--copies", type=int, default=4, help="altered copies of each training recording, for more voices"
    )
    parser.add_argument(
        "--synthesised", type=int, default=1500, help="clips of a synthesiser's voices to train on as well"
    )
    parser.add_argument("--each", type=int, default=100, help="questions of each kind in the evaluation")
    parser.add_argument("--recipe", choices=sorted(RECIPES), nargs="+", default=["lora"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Data:
    """Files of dialogues: taught, one with instructions and their answers, held out for the curve and for the score."""

    taught: Path
    answered: Path
    curve: Path
    held_out: Path


def prepare(args: argparse.Namespace, speaker: str, text_model: Path) -> Data:
    """The data of a speaker, a seed and these numbers; uses what an earlier call has made."""
    numbers = (args.seed, args.steps * args.batch, args.copies, args.synthesised, args.each)
    folder = args.output_dir / "-".join(["data", speaker, *map(str, numbers)])
    data = Data(*(folder / f"{name}.jsonl" for name in ("taught", "answered", "curve", "held_out")))
    if data.held_out.exists():
        return data
    generator, files = random.Random(args.seed), recordings(args.data)
    heard = {
        name: with_altered(digits, folder / "clips" / name, args.copies, args.seed)
        for name, digits in files.items()
        if name != speaker
    }
    if args.synthesised:
        heard["synthesised"] = synthesised(folder / "clips" / "synthesised", args.synthesised, args.seed)
    count = args.steps * args.batch
    write_jsonl(data.taught, taught_set(heard, count, generator))
    asked = write_jsonl(folder / "asked.jsonl", instruction_set(heard, count, generator))
    qwhisper("data", "answer", asked, data.answered, "--text_model", text_model, "--data_root", args.data,
             "--dtype", "bf16", "--max_new_tokens", 64, "--batch_size", 128)  # fmt: skip
    write_jsonl(data.curve, evaluation_set(files[speaker], list(TAUGHT), 32, generator))
    write_jsonl(data.held_out, evaluation_set(files[speaker], list(QUESTIONS), args.each, generator))
    return data


def training_file(data: Data, name: str, count: int) -> Path:
    """`count` dialogues, mixed as the recipe says; beside the answered ones, whose paths are relative to them."""
    recipe = RECIPES[name]
    taught, answered = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (data.taught, data.answered)
    )
    spoken, as_text = round(count * recipe.spoken), round(count * recipe.typed)
    added = [*answered[:spoken], *map(typed, answered[len(answered) - as_text :])]
    file = data.answered.with_name(f"train-{name}.jsonl")
    own = write_jsonl(file.with_suffix(f".{os.getpid()}"), taught[: count - len(added)] + added)
    return own.replace(file)  # at once: another process may read it


def train(
    args: argparse.Namespace, name: str, text_model: Path, data: Data, run: Path, more: Sequence[object] = ()
) -> tuple[Path, float]:
    """All stages of the recipe; the last one's folder and the seconds. more: flags of `train`."""
    stages, seconds, folder = RECIPES[name].stages, 0.0, run
    train_file = training_file(data, name, args.steps * args.batch)
    for number, flags in enumerate(stages, 1):
        steps = args.steps // len(stages)
        bases = ["--audio_model", args.audio_model, "--text_model", text_model]
        start = ["--init_from", folder] if number > 1 else [*bases, *as_arguments(SILENCE)]
        folder = run if number == len(stages) else run.with_name(f"{run.name}-stage{number}")
        seconds += qwhisper(
            "train", "--train_file", train_file, "--data_root", args.data, *start, "--dtype", "bf16",
            "--eval_file", data.curve, "--eval_steps", 25, "--save_total_limit", 1,
            "--output_dir", folder, "--max_steps", steps, "--save_steps", steps, "--seed", args.seed,
            "--per_device_train_batch_size", args.batch, "--gradient_accumulation_steps", 1,
            "--dataloader_num_workers", 2 if torch.cuda.is_available() else 0, *as_arguments(flags), *more,
        )  # fmt: skip
    return folder, seconds


def evaluate(args: argparse.Namespace, data: Data, run: Path) -> dict:
    """The report of `qwhisper eval` on the held-out questions."""
    report = run.with_suffix(".eval.json")
    qwhisper("eval", run, "--eval_file", data.held_out, "--data_root", args.data, "--max_new_tokens", 16,
             "--batch_size", 100, "--dtype", "bf16", "--output_json", report)  # fmt: skip
    return json.loads(report.read_text(encoding="utf-8"))


def steps_until(run: Path, bound: float) -> int | None:
    """The first step at which the held-out loss of the taught kinds was at most `bound`, in nats a token."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    reached = [line["step"] for line in lines if line.get("eval_loss") is not None and line["eval_loss"] <= bound]
    return min(reached, default=None)


def measure(args: argparse.Namespace, name: str, speaker: str, text_model: Path, data: Data) -> None:
    """Trains by one recipe, evaluates and appends the result."""
    recipe, run = RECIPES[name], args.output_dir / f"run-{name}-{speaker}-{args.seed}"
    run, seconds = train(args, name, text_model, data, run)
    began = time.perf_counter()
    result = evaluate(args, data, run)
    scores = {kind: round(result["kinds"][kind]["turns"], 4) for kind in QUESTIONS}
    words = {kind: round(result["kinds"][kind]["text_model"], 4) for kind in QUESTIONS}
    swapped = round(max(result["kinds"][kind]["swapped"] for kind in TAUGHT), 4)
    kept = {name: result[name] and round(result[name], 4) for name in ("retention", "text_shift")}
    settings = {"recipe": name} | {
        name: getattr(args, name) for name in ("steps", "batch", "seed", "copies", "synthesised")
    }
    settings |= as_settings(SILENCE) | {"stages": [as_settings(flags) for flags in recipe.stages]}
    settings |= {"spoken_instructions": recipe.spoken, "typed_instructions": recipe.typed}
    settings |= {"text_model": text_model.name, "audio_model": args.audio_model.name, "eval_speaker": speaker}
    spent = {"train_seconds": round(seconds, 1), "eval_seconds": round(time.perf_counter() - began, 1)}
    spent |= {"steps_to_loss_0.2": steps_until(run, 0.2)} if len(recipe.stages) == 1 else {}
    append_result("real_lm", scores | kept | {"swapped": swapped, "text_lm": words} | settings | spent)


def main() -> None:
    args = parse()
    speaker = args.eval_speaker or sorted(recordings(args.data))[-1]
    text_model = plain_folder(args.text_model, args.output_dir)
    data = prepare(args, speaker, text_model)
    for name in args.recipe:
        measure(args, name, speaker, text_model, data)


if __name__ == "__main__":
    main()
