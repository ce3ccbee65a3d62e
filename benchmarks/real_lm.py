"""A real instruct LM learns to hear digits from some people, and is asked about another, also what no ear taught it.

    python benchmarks/real_lm.py --text_model DIR --audio_model DIR --data DIR --output_dir DIR --recipe lora

Taught: which digit a clip says, and which of two came last. Never taught: sums, comparisons, translation, spelling …,
which the LM can answer when it reads the words; its score there is the bar, and what is reached of it the retention.
Goes through `qwhisper train` and `qwhisper eval`. A folder with one GGUF file is turned into an ordinary model folder
first.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from augment import write_altered, write_synthesised
from common import DIGITS, SILENCE, append_result, as_arguments, as_settings, audio_part, pick, qwhisper, recordings
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qwhisper.demo.dialogues import write_jsonl

SPANISH = ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve")
# kind: (clips, question, the right answer from the digits)
QUESTIONS: dict[str, tuple[int, str, Callable[..., object]]] = {
    "clip": (1, "Which digit was said? Answer with one digit.", lambda a: a),
    "last": (2, "Which digit was said last? Answer with one digit.", lambda a, b: b),
    "sum": (2, "What do the two digits add up to? Answer with the number alone.", lambda a, b: a + b),
    "next": (1, "Which number comes right after this one? Answer with the number alone.", lambda a: a + 1),
    "larger": (2, "Which of the two numbers is larger? Answer with the number alone.", max),
    "spanish": (1, "Translate this number into Spanish. Answer with one word.", lambda a: SPANISH[a]),
    "spell": (1, "Spell this word, with a hyphen between the letters.", lambda a: "-".join(DIGITS[a])),
    "both": (
        2,
        "Repeat both words, with a space between them and nothing else.",
        lambda a, b: f"{DIGITS[a]} {DIGITS[b]}",
    ),
    "even": (1, "Is the digit even? Answer yes or no.", lambda a: "no" if a % 2 else "yes"),
}
TAUGHT = {"clip": 0.5, "last": 0.5}
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
TAUGHT_BY_THE_LM = {"--distill_weight": 1.0}
RECIPES: dict[str, list[dict[str, object]]] = {  # the flags of each stage; a later one starts from the one before
    "stable": [{}],
    "lora": [FAST],
    "low_lora": [GENTLE],
    "few_targets": [FAST | {"--lora_target_modules": ["q_proj", "v_proj"]}],
    "projector": [PROJECTOR],
    "two_stage": [PROJECTOR, GENTLE],
    "distill": [FAST | {"--distill_weight": 0.5}],
    "distill_alone": [FAST | TAUGHT_BY_THE_LM],
    "projector_distill": [PROJECTOR | TAUGHT_BY_THE_LM],
    "two_stage_distill": [PROJECTOR | TAUGHT_BY_THE_LM, GENTLE | TAUGHT_BY_THE_LM],
}


def dialogue(kind: str, id: str, generator: random.Random, files: dict) -> dict:
    count, question, right = QUESTIONS[kind]
    clips = [pick(generator, files) for _ in range(count)]
    content = [*(audio_part(*clip) for clip in clips), {"type": "text", "text": question}]
    answer = {"role": "assistant", "content": str(right(*(digit for digit, _ in clips))), "kind": kind}
    return {"id": id, "messages": [{"role": "user", "content": content}, answer]}


def training_set(files: dict[str, dict], count: int, generator: random.Random) -> list[dict]:
    kinds = generator.choices(list(TAUGHT), list(TAUGHT.values()), k=count)
    return [dialogue(kind, f"t{i}", generator, files[generator.choice(sorted(files))]) for i, kind in enumerate(kinds)]


def with_altered(digits: dict[int, list[Path]], folder: Path, copies: int, seed: int) -> dict[int, list[Path]]:
    """A speaker's recordings and `copies` altered ones of each."""
    groups = {digit: write_altered(files, folder, copies, seed) for digit, files in digits.items()}
    return {digit: [path for group in groups[digit] for path in group] for digit in digits}


def synthesised(folder: Path, count: int, seed: int) -> dict[int, list[Path]]:
    digits: dict[int, list[Path]] = {digit: [] for digit in range(10)}
    for word, path in write_synthesised(folder, count, seed):
        digits[DIGITS.index(word)].append(path)
    return digits


def evaluation_set(files: dict, each: int, generator: random.Random) -> list[dict]:
    return [dialogue(kind, f"{kind}{i}", generator, files) for kind in QUESTIONS for i in range(each)]


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_model", type=Path, required=True)
    parser.add_argument("--audio_model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of DIGIT_SPEAKER_TAKE.wav")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--eval_speaker", default=None, help="who is never heard in training (default: the last by name)"
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
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="lora")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(args: argparse.Namespace, text_model: Path, train_file: Path, run: Path) -> tuple[Path, float]:
    """All stages of the recipe; the last one's folder and the seconds."""
    stages, seconds, folder = RECIPES[args.recipe], 0.0, run
    for number, flags in enumerate(stages, 1):
        steps = args.steps // len(stages)
        bases = ["--audio_model", args.audio_model, "--text_model", text_model]
        start = ["--init_from", folder] if number > 1 else [*bases, *as_arguments(SILENCE)]
        folder = run if number == len(stages) else run.with_name(f"{run.name}-stage{number}")
        seconds += qwhisper(
            "train", "--train_file", train_file, "--data_root", args.data, *start, "--dtype", "bf16",
            "--output_dir", folder, "--max_steps", steps, "--save_steps", steps, "--seed", args.seed,
            "--per_device_train_batch_size", args.batch, "--gradient_accumulation_steps", 1,
            "--dataloader_num_workers", 4 if torch.cuda.is_available() else 0, *as_arguments(flags),
        )  # fmt: skip
    return folder, seconds


def main() -> None:
    args = parse()
    files = recordings(args.data)
    speaker = args.eval_speaker or sorted(files)[-1]
    generator = random.Random(args.seed)
    name = f"{args.recipe}-{speaker}-{args.seed}"
    data = args.output_dir / f"data-{name}"
    others = {
        name: with_altered(digits, data / "clips" / name, args.copies, args.seed)
        for name, digits in files.items()
        if name != speaker
    }
    others["synthesised"] = synthesised(data / "clips" / "synthesised", args.synthesised, args.seed)
    train_file = write_jsonl(data / "train.jsonl", training_set(others, args.steps * args.batch, generator))
    held_out = write_jsonl(data / "eval.jsonl", evaluation_set(files[speaker], args.each, generator))
    text_model = plain_folder(args.text_model, args.output_dir)
    run, seconds = train(args, text_model, train_file, args.output_dir / f"run-{name}")
    report = data / "eval.json"
    began = time.perf_counter()
    qwhisper("eval", run, "--eval_file", held_out, "--data_root", args.data, "--max_new_tokens", 16, "--batch_size", 32,
             "--dtype", "bf16", "--output_json", report)  # fmt: skip
    result = json.loads(report.read_text())
    scores = {kind: round(result["kinds"][kind]["turns"], 4) for kind in QUESTIONS}
    words = {kind: round(result["kinds"][kind]["text_model"], 4) for kind in QUESTIONS}
    swapped = round(max(result["kinds"][kind]["swapped"] for kind in TAUGHT), 4)
    kept = {name: result[name] and round(result[name], 4) for name in ("retention", "text_shift")}
    settings = {name: getattr(args, name) for name in ("recipe", "steps", "batch", "seed", "copies", "synthesised")}
    settings |= as_settings(SILENCE) | {"stages": [as_settings(flags) for flags in RECIPES[args.recipe]]}
    settings |= {"text_model": text_model.name, "audio_model": args.audio_model.name, "eval_speaker": speaker}
    spent = {"train_seconds": round(seconds, 1), "eval_seconds": round(time.perf_counter() - began, 1)}
    append_result("real_lm", scores | kept | {"swapped": swapped, "text_lm": words} | settings | spent)


if __name__ == "__main__":
    main()
