"""Real recordings of digits, a real Whisper encoder, a small Qwen3: heard from some people, asked about others.

    python benchmarks/spoken_digits.py --audio_model DIR --tokenizer DIR --data DIR \
        --train_speakers george,jackson,lucas --eval_speakers nicolas --output_json result.json

The encoder stays frozen. The Qwen3 has the real tokenizer, is pre-trained on text dialogues as in `qwhisper demo`, and
kept in --cache_dir for the next run; then the product's own commands train it to listen and evaluate it. Reports shares
from 0 to 1: clip (one clip, which number), turn (all answers), dialogue (all answers of a dialogue), swapped (answers
that stay the same when other clips are put in).
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

from augment import write_altered, write_synthesised
from common import SILENCE, append_result, as_arguments, as_settings, qwhisper, recordings
from transformers import AutoTokenizer

from qwhisper.demo.bases import make_qwen3_base
from qwhisper.demo.dialogues import NUMBERS, QUESTIONS, Clip, spoken_dialogues, text_dialogues, write_jsonl
from qwhisper.evaluate.metrics import share, whole_dialogue_share

# More of both than in the demo: the score in words bounds the score in listening, and the demo's 97 % were the bound.
# These give 300 of 300 held-out dialogues.
TEXT_DIALOGUES, TEXT_STEPS = 24_000, 1000
# Not the stable recipe's 3e-5, at which a language model this small does not listen for thousands of steps. The
# projector learns slowly: at 5e-4 it fits the voices that it hears, and reads a voice that it never heard worse.
RATES = {
    "--learning_rate": 5e-4,
    "--projector_learning_rate": 4e-4,
    "--projector_dropout": 0.5,
    "--lora_dropout": 0.1,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio_model", type=Path, required=True, help="folder of a Whisper encoder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of Qwen3's tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder of DIGIT_SPEAKER_TAKE.wav")
    parser.add_argument("--train_speakers", required=True, help="names, separated by commas")
    parser.add_argument("--eval_speakers", required=True, help="names, separated by commas")
    parser.add_argument("--output_json", type=Path, required=True)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/spoken-digits"), help="for dialogues and checkpoints"
    )
    parser.add_argument(
        "--cache_dir", type=Path, default=Path("runs/spoken-digits-bases"), help="for the pre-trained Qwen3"
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--copies", type=int, default=4, help="altered copies of each training recording")
    parser.add_argument(
        "--synthesised", type=int, default=1500, help="clips of a synthesiser's voices to train on as well"
    )
    parser.add_argument("--eval_dialogues", type=int, default=204)
    parser.add_argument("--eval_clips", type=int, default=300, help="recordings asked about one by one")
    parser.add_argument("--dtype", default="bf16", help="of the encoder and the LM")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def text_base(args: argparse.Namespace) -> Path:
    """The pre-trained Qwen3 from the cache, or a new one."""
    folder = args.cache_dir / f"qwen3-seed{args.seed}"
    if not (folder / "model.safetensors").exists():
        print("pre-training a small Qwen3 on text dialogues …", flush=True)
        began = time.perf_counter()
        records = text_dialogues(TEXT_DIALOGUES, args.seed)
        held_out = text_dialogues(300, args.seed + 1)
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        report = make_qwen3_base(
            folder, records, args.seed, num_steps=TEXT_STEPS, held_out=held_out, tokenizer=tokenizer
        )
        print(f"{report} in {time.perf_counter() - began:.0f} s", flush=True)
    return folder


def clips_of(data: Path, speakers: str) -> list[Clip]:
    """Every recording of the named speakers."""
    found = recordings(data)
    missing = set(speakers.split(",")) - found.keys()
    if missing:
        raise SystemExit(f"{data}: no recordings of {', '.join(sorted(missing))}; there are {', '.join(sorted(found))}")
    return [
        Clip(str(path), NUMBERS[digit])
        for speaker in speakers.split(",")
        for digit, files in found[speaker].items()
        for path in files
    ]


def with_altered(clips: list[Clip], folder: Path, copies: int, seed: int) -> list[Clip]:
    groups = write_altered([Path(clip.path) for clip in clips], folder, copies, seed)
    return [Clip(str(path), clip.word) for clip, group in zip(clips, groups, strict=True) for path in group]


def single_clips(clips: list[Clip]) -> list[dict]:
    """One dialogue a recording: which number is it?"""
    question = {"type": "text", "text": QUESTIONS["number"][0]}
    return [
        {
            "id": f"clip-{index}",
            "messages": [
                {"role": "user", "content": [{"type": "audio", "audio": clip.path, "transcript": clip.word}, question]},
                {"role": "assistant", "content": clip.word, "kind": "clip"},
            ],
        }
        for index, clip in enumerate(clips)
    ]


def write_data(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The dialogues to train on and the held-out ones, with the clips that are made for them."""
    train_clips = with_altered(clips_of(args.data, args.train_speakers), folder / "clips", args.copies, args.seed)
    made = write_synthesised(folder / "synthesised", args.synthesised, args.seed)
    train_clips += [Clip(str(path), word) for word, path in made]
    eval_clips = clips_of(args.data, args.eval_speakers)
    train, _ = spoken_dialogues(train_clips, args.steps * args.batch, "train", args.seed)
    held_out, _ = spoken_dialogues(eval_clips, args.eval_dialogues, "eval", args.seed + 1)
    order = random.Random(args.seed).sample(range(len(eval_clips)), min(args.eval_clips, len(eval_clips)))
    held_out += single_clips([eval_clips[i] for i in order])
    return write_jsonl(folder / "train.jsonl", train), write_jsonl(folder / "eval.jsonl", held_out)


def learn(
    args: argparse.Namespace, text_model: Path, files: tuple[Path, Path], run: Path, more: Sequence[object] = ()
) -> tuple[dict, float]:
    """Train into `run` and evaluate; the report of `qwhisper eval`, and the seconds of the training. more: flags of
    `train`.
    """
    train_file, eval_file = files
    train_seconds = qwhisper(
        "train", "--train_file", train_file, "--data_root", args.data,
        "--audio_model", args.audio_model, "--text_model", text_model,
        "--output_dir", run, "--max_steps", args.steps, "--save_steps", args.steps,
        "--per_device_train_batch_size", args.batch, "--gradient_accumulation_steps", 1,
        "--dtype", args.dtype, "--early_lr_steps", 20, "--seed", args.seed,
        *as_arguments(SILENCE | RATES), *more,
    )  # fmt: skip
    report = run.with_suffix(".eval.json")
    qwhisper(
        "eval", run, "--eval_file", eval_file, "--data_root", args.data, "--dtype", args.dtype,
        "--max_new_tokens", 8, "--batch_size", 32, "--output_json", report,
    )  # fmt: skip
    return json.loads(report.read_text(encoding="utf-8")), train_seconds


def scores_of(result: dict) -> dict[str, float]:
    spoken = [answer for answer in result["answers"] if answer["kind"] != "clip"]
    scores = {
        "clip": result["kinds"]["clip"]["turns"],
        "turn": share(answer["right"] for answer in spoken),
        "dialogue": whole_dialogue_share([answer["id"] for answer in spoken], [answer["right"] for answer in spoken]),
        "swapped": result["turns_swapped"],
    }
    return {name: round(value, 4) for name, value in scores.items()}


def main() -> None:
    args = parse()
    began = time.perf_counter()
    text_model = text_base(args)
    folder = args.output_dir / f"{args.eval_speakers}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    result, train_seconds = learn(args, text_model, write_data(args, folder), folder / "run")
    scores = scores_of(result)
    args.output_json.parent.mkdir(parents=True, exist_ok=True)
    args.output_json.write_text(json.dumps(scores), encoding="utf-8")
    names = ("train_speakers", "eval_speakers", "steps", "batch", "seed", "copies", "synthesised")
    settings = {name: getattr(args, name) for name in names}
    settings |= as_settings(SILENCE | RATES)
    seconds = {"train_seconds": round(train_seconds, 1), "seconds": round(time.perf_counter() - began, 1)}
    append_result("spoken_digits", scores | settings | {"audio_model": args.audio_model.name} | seconds)


if __name__ == "__main__":
    main()
