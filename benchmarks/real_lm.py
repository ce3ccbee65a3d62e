"""A real instruct LM learns to hear digits from some people, and is asked about another, also what no ear taught it.

    python benchmarks/real_lm.py --text_model DIR --audio_model DIR --data DIR --output_dir DIR

Taught: which digit a clip says, and which of two came last. Never taught: their sum, and whether a digit is even, which
the LM can answer when it reads the words; that score is printed beside. Goes through `qwhisper train` and `qwhisper
eval`. A folder with one GGUF file is turned into an ordinary model folder first.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from augment import write_altered, write_synthesised
from common import DIGITS, SILENCE, append_result, as_arguments, as_settings, audio_part, pick, qwhisper, recordings
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qwhisper.demo.dialogues import write_jsonl
from qwhisper.evaluate.metrics import same

QUESTIONS = {
    "clip": (1, "Which digit was said? Answer with one digit."),
    "last": (2, "Which digit was said last? Answer with one digit."),
    "sum": (2, "What do the two digits add up to? Answer with the number alone."),
    "even": (1, "Is the digit even? Answer yes or no."),
}
TAUGHT = {"clip": 0.5, "last": 0.5}
# Not the stable recipe's: a few hundred steps must do what it does in thousands. The warm-up is needed: the LM's first
# norm divides by the projector's small first outputs, so that gradients of some hundreds come early, and at the full
# rate one run of four never listened again after one.
RATES = {
    "--learning_rate": 2e-4,
    "--projector_learning_rate": 5e-4,
    "--projector_dropout": 0.5,
    "--warmup_steps": 40,
    "--early_lr_steps": 0,
    "--freeze_projector_steps": 0,
}


def right_answer(kind: str, digits: list[int]) -> str:
    if kind == "even":
        return "yes" if digits[0] % 2 == 0 else "no"
    return str(sum(digits) if kind == "sum" else digits[-1])


def dialogue(kind: str, id: str, generator: random.Random, files: dict) -> dict:
    count, question = QUESTIONS[kind]
    clips = [pick(generator, files) for _ in range(count)]
    content = [*(audio_part(*clip) for clip in clips), {"type": "text", "text": question}]
    answer = {"role": "assistant", "content": right_answer(kind, [digit for digit, _ in clips]), "kind": kind}
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


@torch.no_grad()
def text_scores(text_model: Path, dialogues: list[dict], device: str) -> dict[str, float]:
    """What the LM itself answers right when it reads the words, per kind: the bar for what it hears."""
    tokenizer = AutoTokenizer.from_pretrained(text_model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.bfloat16).to(device).eval()
    right: dict[str, list[bool]] = {}
    for start in range(0, len(dialogues), 32):
        batch = dialogues[start : start + 32]
        prompts = [in_words(tokenizer, d["messages"][0]["content"]) for d in batch]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for d, answer in zip(batch, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            reference = d["messages"][1]
            right.setdefault(reference["kind"], []).append(same(reference["content"], answer.split("\n")[0]))
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}


def in_words(tokenizer, content: list[dict]) -> str:
    text = " ".join(part.get("transcript") or part["text"] for part in content)
    if tokenizer.chat_template is None:
        return f"User: {text}\nAssistant: "
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )


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
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = recordings(args.data)
    speaker = args.eval_speaker or sorted(files)[-1]
    generator = random.Random(args.seed)
    run, data = args.output_dir / f"run-{speaker}-{args.seed}", args.output_dir / f"data-{speaker}-{args.seed}"
    others = {
        name: with_altered(digits, data / "clips" / name, args.copies, args.seed)
        for name, digits in files.items()
        if name != speaker
    }
    others["synthesised"] = synthesised(data / "clips" / "synthesised", args.synthesised, args.seed)
    train = write_jsonl(data / "train.jsonl", training_set(others, args.steps * args.batch, generator))
    evaluation = evaluation_set(files[speaker], args.each, generator)
    held_out = write_jsonl(data / "eval.jsonl", evaluation)
    text_model = plain_folder(args.text_model, args.output_dir)
    words = text_scores(text_model, evaluation, device)
    print("given the words, the LM itself: " + ", ".join(f"{k} {v:.0%}" for k, v in words.items()), flush=True)

    seconds = qwhisper(
        "train", "--train_file", train, "--data_root", args.data,
        "--audio_model", args.audio_model, "--text_model", text_model, "--dtype", "bf16",
        "--output_dir", run, "--max_steps", args.steps, "--save_steps", args.steps, "--seed", args.seed,
        "--per_device_train_batch_size", args.batch, "--gradient_accumulation_steps", 1,
        "--dataloader_num_workers", 4 if device == "cuda" else 0,
        *as_arguments(SILENCE | RATES),
    )  # fmt: skip
    report = data / "eval.json"
    began = time.perf_counter()
    qwhisper("eval", run, "--eval_file", held_out, "--data_root", args.data, "--max_new_tokens", 8, "--batch_size", 32,
             "--dtype", "bf16", "--output_json", report)  # fmt: skip
    result = json.loads(report.read_text())
    scores = {kind: round(result["kinds"][kind]["turns"], 4) for kind in QUESTIONS}
    taught = [result["kinds"][kind]["swapped"] for kind in TAUGHT]
    settings = {name: getattr(args, name) for name in ("steps", "batch", "seed", "copies", "synthesised")}
    settings |= as_settings(SILENCE | RATES)
    settings |= {"text_model": text_model.name, "audio_model": args.audio_model.name, "eval_speaker": speaker}
    scores |= {"swapped": round(max(taught), 4), "text_lm": {k: round(v, 4) for k, v in words.items()}}
    spent = {"train_seconds": round(seconds, 1), "eval_seconds": round(time.perf_counter() - began, 1)}
    append_result("real_lm", scores | settings | spent)


if __name__ == "__main__":
    main()
