"""Speed and memory with the real shapes of Whisper Large V3 Turbo and Qwen3, random weights, through `qwhisper train`.

    python benchmarks/real_shapes.py --tokenizer DIR --output_dir DIR --size 0.6b --batch 16
    python benchmarks/real_shapes.py --tokenizer DIR --output_dir DIR --size 8b --load_in_4bit --steps 200 --resume

Audio is noise of 1 to 30 s, 9 s on average, as in read and conversational speech; questions and answers are random
words. Reports samples a second over the second half of the steps, and the peak of allocated memory. --resume also
stops half-way and resumes from there.
"""

import argparse
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
from common import append_result, qwhisper
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from qwhisper.demo.dialogues import write_jsonl
from qwhisper.report.events import acts, read_jsonl

SIZES = {  # hidden, layers, intermediate, heads, key heads, tied embeddings
    "0.6b": (1024, 28, 3072, 16, 8, True),
    "1.7b": (2048, 28, 6144, 16, 8, True),
    "4b": (2560, 36, 9728, 32, 8, True),
    "8b": (4096, 36, 12288, 32, 8, False),
    "14b": (5120, 40, 17408, 40, 8, False),
    "32b": (5120, 64, 25600, 64, 8, False),
    "tiny": (64, 2, 128, 4, 2, True),
}
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")

WORDS_A_SECOND = 2.5  # of a transcript, which a teacher reads


def save_random(model_class, config, folder: Path) -> None:
    """Random weights straight in bf16, on the accelerator if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def qwen3_config(size: str) -> Qwen3Config:
    hidden, layers, intermediate, heads, key_heads, tied = SIZES[size]
    return Qwen3Config(
        vocab_size=151_936, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate,
        num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=128, tie_word_embeddings=tied,
        max_position_embeddings=40_960, eos_token_id=151_645, pad_token_id=151_643,
    )  # fmt: skip


def make_bases(folder: Path, size: str, tokenizer: Path, *, nf4: bool = False) -> tuple[Path, Path]:
    """(audio, text) folders, written if they are missing. nf4: the language model is saved in 4 bits."""
    audio = folder / ("whisper-tiny" if size == "tiny" else "whisper-turbo")
    text = folder / (f"qwen3-{size}-nf4" if nf4 else f"qwen3-{size}")
    if not audio.exists():
        width, layers, heads = (32, 2, 2) if size == "tiny" else (1280, 32, 20)
        whisper = WhisperConfig(
            d_model=width, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * width,
            decoder_layers=1, decoder_attention_heads=heads, decoder_ffn_dim=4 * width, num_mel_bins=128,
        )  # fmt: skip
        save_random(WhisperEncoder, whisper, audio)
        WhisperFeatureExtractor(feature_size=128).save_pretrained(audio)
    if not text.exists():
        if nf4:
            from nf4_base import write_nf4_base  # imports an optional package

            write_nf4_base(qwen3_config(size), text)
        else:
            save_random(Qwen3ForCausalLM, qwen3_config(size), text)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(text)
    return audio, text


def make_data(folder: Path, count: int, *, longest_s: float = 30.0, most_turns: int = 1) -> Path:
    """`count` dialogues about noise, with transcripts: a clip, a question in words and an answer in each turn.

    Durations are of a gamma distribution, 9 s on average, 1 to 30 s; with a larger `longest_s` as many of each
    duration on a logarithmic scale, from 1 s on. A dialogue has 1 to `most_turns` turns.
    """
    usual = longest_s == 30.0 and most_turns == 1
    clips = folder / ("clips" if usual else f"clips-{longest_s:g}-{most_turns}")
    durations, words, words_said, turns = np.random.default_rng(0), random.Random(0), random.Random(1), random.Random(2)
    records: list[dict] = []
    clips.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        written = []
        for index in range(count):
            messages: list[dict] = []
            for turn in range(turns.randint(1, most_turns)):
                seconds = _seconds(durations, longest_s)
                clip = clips / (f"{index}.flac" if turn == 0 else f"{index}-{turn}.flac")
                if not clip.exists():
                    written.append(pool.submit(write_noise, clip, seconds, (index, turn)))
                question, answer = (_sentence(words, *span) for span in ((12, 40), (10, 110)))
                transcript = " ".join(words_said.choices(WORDS, k=1 + round(WORDS_A_SECOND * seconds)))
                audio = {"type": "audio", "audio": f"{clips.name}/{clip.name}", "transcript": transcript}
                content = [audio, {"type": "text", "text": question}]
                messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            records.append({"id": str(index), "messages": messages})
        for done in written:
            done.result()
    return write_jsonl(folder / f"train-{clips.name}-{count}.jsonl", records)


def write_noise(clip: Path, seconds: float, seed: tuple[int, int]) -> None:
    noise = 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * 16_000), dtype=np.float32)
    soundfile.write(clip, np.clip(noise, -1, 1), 16_000)


def _seconds(generator: np.random.Generator, longest_s: float) -> float:
    if longest_s <= 30.0:
        return float(np.clip(generator.gamma(2.2, 4.0), 1.0, longest_s))
    return float(np.exp(generator.uniform(0.0, np.log(longest_s))))


def _sentence(words: random.Random, fewest: int, most: int) -> str:
    return " ".join(words.choices(WORDS, k=words.randrange(fewest, most)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="0.6b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--nf4_base", action="store_true", help="the base is saved in 4 bits: 14b and 32b need it")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--resume", action="store_true", help="in two halves, with a checkpoint between and evaluation")
    return parser.parse_args()


def main() -> None:
    args = parse()
    began = time.perf_counter()
    audio, text = make_bases(args.output_dir, args.size, args.tokenizer, nf4=args.nf4_base)
    data = make_data(args.output_dir / "data", min(800, args.steps * args.batch))
    print(f"bases and data in {time.perf_counter() - began:.0f} s", flush=True)
    run = args.output_dir / f"run-{args.size}-{args.batch}-{time.strftime('%H%M%S')}"
    flags = [name for name in ("load_in_4bit", "gradient_checkpointing") if getattr(args, name)]
    marks = flags + [name for name in ("nf4_base", "resume") if getattr(args, name)]
    command = [
        "train", "--train_file", data, "--output_dir", run, "--audio_model", audio, "--text_model", text,
        "--save_steps", args.steps,
        "--per_device_train_batch_size", args.batch, "--gradient_accumulation_steps", 1, "--num_train_epochs", 1000,
        "--dataloader_num_workers", 8 if torch.cuda.is_available() else 0, *(f"--{name}" for name in flags),
    ]  # fmt: skip
    if args.resume:
        held_out = write_jsonl(
            data.with_name("eval.jsonl"), [json.loads(x) for x in data.read_text().splitlines()[:16]]
        )
        command += ["--eval_file", held_out]
        qwhisper(*command, "--max_steps", args.steps // 2)
        qwhisper(*command, "--max_steps", args.steps, "--resume_from_checkpoint")
    else:
        qwhisper(*command, "--max_steps", args.steps)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    late = steps[len(steps) // 2 :]
    assert len(steps) == args.steps, f"{len(steps)} steps are logged, {args.steps} were run"
    result = {
        "size": args.size,
        "batch": args.batch,
        "steps": args.steps,
        "flags": marks,
        "samples_per_second": round(args.batch * len(late) / sum(step["seconds"] for step in late), 2),
        "peak_memory_gib": max(step.get("peak_memory_gib", 0.0) for step in steps),
        "loss_first": round(float(steps[0]["loss"]), 4),
        "loss_last": round(float(steps[-1]["loss"]), 4),
        "max_grad_norm_seen": round(max(float(step["grad_norm"]) for step in steps), 2),
        "skipped_or_retried": len(acts(read_jsonl(run / "events.jsonl"))),
    }
    append_result("real_shapes", result)


if __name__ == "__main__":
    main()
