"""Bases and data that same_numbers.py gives to both of its trees: made once, used again by later calls."""

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from common import ROOT
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(ROOT))
from qwhisper.demo.prepare import DemoSize, prepare

SEED, EVAL_DIALOGUES = 3, 17
SMALL_DEMO = DemoSize(
    train_clips=300, eval_clips=60, train_dialogues=400, eval_dialogues=EVAL_DIALOGUES,
    encoder_steps=30, lm_steps=60, unseen_texts=17,
)  # fmt: skip
DEMO_SILENCE = {"--audio_lead_silence": 0.05, "--audio_tail_silence": 0.1}
FAULTY_CLIPS = ("silent", "stereo", "torn", "missing")


@dataclass(frozen=True)
class Inputs:
    """What both trees read; data lies in `data`, see `make_data`."""

    audio_model: Path
    text_model: Path
    data: Path
    flags: dict[str, object]


def make_inputs(folder: Path, demo: Path | None, models: Path, bases: str) -> Inputs:
    """Bases and data, or those that an earlier case has made; `demo` is a finished demo's folder, or None."""
    if demo is None:
        demo = folder / "demo"
        if not (demo / "bases.json").exists():  # which is written last
            prepare(demo, SEED, SMALL_DEMO)
    data = folder / "data"
    if not (data / "faulty.jsonl").exists():
        make_data(data, demo)
    if bases == "demo":
        return Inputs(demo / "whisper-base", demo / "qwen3-base", data, DEMO_SILENCE)
    text_model = folder / "random-qwen3"
    if not (text_model / "tokenizer.json").exists():
        make_random_qwen3(text_model, models / "qwen3-tokenizer")
    return Inputs(models / "whisper-tiny.en", text_model, data, {})


def make_data(folder: Path, demo: Path) -> None:
    """train.jsonl, eval.jsonl and their clips from a demo's folder, and faulty.jsonl, which is for `data check`."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    train = copy_dialogues(demo / "train.jsonl", SMALL_DEMO.train_dialogues, folder)
    copy_dialogues(demo / "eval.jsonl", EVAL_DIALOGUES, folder)
    soundfile.write(folder / "clips/silent.wav", np.zeros(8000, np.int16), 16_000)
    soundfile.write(folder / "clips/stereo.wav", np.linspace(-0.5, 0.5, 8820).reshape(4410, 2), 22_050)
    (folder / "clips/torn.wav").write_bytes((folder / train[0]["audio"]).read_bytes()[:30])
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    records[1] = asked("silent", {"type": "audio", "audio": "clips/silent.wav", "transcript": "one"})
    write_lines(folder / "train.jsonl", map(json.dumps, records))
    audio = {name: {"type": "audio", "audio": f"clips/{name}.wav", "transcript": "one"} for name in FAULTY_CLIPS}
    faulty = [json.dumps(asked(name, part)) for name, part in audio.items()]
    faulty += [
        "{", "[]", json.dumps({"id": "empty", "messages": []}),
        json.dumps({"id": "unanswered", "messages": [{"role": "user", "content": "Is anybody there?"}]}),
        json.dumps({"id": "role", "messages": [{"role": "narrator", "content": "He left."}]}),
        json.dumps(asked("long", {"type": "text", "text": "word " * 5000})),
    ]  # fmt: skip
    write_lines(folder / "faulty.jsonl", faulty)


def asked(name: str, part: dict) -> dict:
    question = {"type": "text", "text": "Which number is it?"}
    answer = {"role": "assistant", "content": "one", "kind": "number"}
    return {"id": name, "messages": [{"role": "user", "content": [part, question]}, answer]}


def copy_dialogues(file: Path, count: int, folder: Path) -> list[dict]:
    """The first `count` dialogues of a JSONL file, with their clips; returns the audio parts."""
    lines = file.read_text(encoding="utf-8").splitlines()[:count]
    contents = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    parts = [part for content in contents if isinstance(content, list) for part in content if part["type"] == "audio"]
    for name in {part["audio"] for part in parts}:
        shutil.copy(file.parent / name, folder / name)
    write_lines(folder / file.name, lines)
    return parts


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def make_random_qwen3(folder: Path, tokenizer_folder: Path) -> None:
    """Weights larger than a fresh model's, with which different prompts have different answers."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 64, hidden_size=64, intermediate_size=192, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        initializer_range=0.2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
