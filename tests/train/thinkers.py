"""A small language model that answers seven questions about a letter that it reads, and tones that say such letters."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch import nn

from qwhisper.data.dialogue import read_dialogues
from qwhisper.demo.bases import TwoOptimizers
from qwhisper.evaluate.forgetting import choose_questions
from qwhisper.frames import SAMPLE_RATE
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.probe import ListeningProbe
from qwhisper.train.session import Session
from tests.small import teach, tone, write_small_bases
from tests.train.listeners import probe_of, trained_session

LETTERS = "abcd"
KINDS: dict[str, Callable[[int], str]] = {  # the answer from the letter's number
    "same": lambda n: LETTERS[n],
    "next": lambda n: LETTERS[(n + 1) % 4],
    "opposite": lambda n: LETTERS[(n + 2) % 4],
    "previous": lambda n: LETTERS[n - 1],
    "twice": lambda n: LETTERS[n] * 2,
    "capital": lambda n: LETTERS[n].upper(),
    "number": str,
}
FEW = ["same", "next", "opposite"]  # as many as show what is forgotten
TAUGHT = ["same"]  # by ear
CLIP_SECONDS, CLIP_TOKENS = 0.24, 3  # its transcript has as many letters


def dialogue(kind: str, letter: int, clip: str | None = None) -> dict:
    text, question = LETTERS[letter] * CLIP_TOKENS, f" {kind}?"
    heard = [{"type": "audio", "audio": clip, "transcript": text}, {"type": "text", "text": question}]
    answer = {"role": "assistant", "content": KINDS[kind](letter), "kind": kind}
    asked = {"role": "user", "content": heard if clip else text + question}
    return {"id": f"{kind}-{clip or text}", "messages": [asked, answer]}


def write_thinking_bases(folder: Path, kinds: Sequence[str], *, num_steps: int = 150) -> tuple[Path, Path]:
    """(audio, text) folders; the text model answers all of `kinds`."""
    audio, text = write_small_bases(folder, hidden_size=64)
    questions = [dialogue(kind, letter) for kind in kinds for letter in range(len(LETTERS))]

    def optimizer(model: nn.Module) -> TwoOptimizers:
        return TwoOptimizers(model, lambda name, p: p.ndim == 2 and "layers." in name, 3e-3, num_steps)

    teach(text, questions, optimizer, num_steps=num_steps, noise=0.5)
    return audio, text


def write_spoken(folder: Path, name: str, kinds: Sequence[str], *, each: int, seed: int) -> str:
    """A file with `each` clips of every letter, each asked about in all `kinds`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    lines = []
    for letter in range(len(LETTERS)):
        for number in range(each):
            clip = f"{name}-{LETTERS[letter]}{number}.wav"
            pitch = 200 * 2**letter * generator.uniform(0.97, 1.03)
            soundfile.write(folder / clip, tone(pitch, CLIP_SECONDS), SAMPLE_RATE)
            lines += [json.dumps(dialogue(kind, letter, clip=clip)) for kind in kinds]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def thinking_arguments(
    bases: tuple[Path, Path], folder: Path, *, held_out: Sequence[str] = FEW, **values
) -> TrainArguments:
    """A run on spoken questions of the kinds TAUGHT."""
    base: dict[str, Any] = {
        "train_file": write_spoken(folder, "train", TAUGHT, each=12, seed=0),
        "eval_file": write_spoken(folder, "eval", held_out, each=6, seed=1),
        "output_dir": str(folder / "run"),
        "audio_model": str(bases[0]),
        "text_model": str(bases[1]),
        "max_steps": 60,
        "projector_learning_rate": 3e-3,
        "lora_init_scale": 1.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "freeze_projector_steps": 0,
        "early_lr_steps": 0,
        "audio_lead_silence": 0.0,
        "audio_tail_silence": 0.0,
        "dtype": "fp32",
    }
    return TrainArguments(**base | values)


def train_and_ask(args: TrainArguments) -> tuple[Session, ListeningProbe]:
    """Trains `args.max_steps` steps, and gives the probe on the held-out dialogues, with all of its questions."""
    run = trained_session(args)
    assert args.eval_file
    held_out = read_dialogues(args.eval_file)
    return run, probe_of(
        run, held_out, trained_kinds=TAUGHT, questions=choose_questions(held_out, run.encoder, TAUGHT, seed=args.seed)
    )
