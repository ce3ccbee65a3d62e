"""Makes everything that the demo trains on, in one folder: clips, dialogues and two base models."""

import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

from qwhisper.demo.bases import ENCODER_STEPS, LM_BATCH, LM_STEPS, make_qwen3_base, make_whisper_base
from qwhisper.demo.dialogues import NUMBERS, Clip, spoken_dialogues, text_dialogues, write_jsonl
from qwhisper.demo.speech import draw_utterances, write_clips


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """Sizes: 8160 dialogues are 680 steps of 12, none used twice; 306 use each of 600 clips about once."""

    train_clips: int = 6000
    eval_clips: int = 600
    train_dialogues: int = 8160
    eval_dialogues: int = 306
    encoder_steps: int = ENCODER_STEPS
    lm_steps: int = LM_STEPS
    unseen_texts: int = 300


@dataclass(frozen=True)
class DemoPaths:
    """What `prepare` made.

    swapped_file: the evaluation's dialogues with other clips, which make every answer in it wrong.
    report: how well each base learned, on unseen voices and dialogues.
    """

    train_file: Path
    eval_file: Path
    swapped_file: Path
    audio_model: Path
    text_model: Path
    report: dict[str, dict[str, float]]


def prepare(out_dir: str | Path, seed: int, size: DemoSize | None = None) -> DemoPaths:
    """Make clips, dialogues and base models in `out_dir`, and print the time of each stage. The same seed gives the
    same files.

    The two bases are trained in parallel, in a process with one thread each: on two cores this is faster than one after
    the other.
    """
    out_dir, size = Path(out_dir), size or DemoSize()
    started = time.perf_counter()
    clips, held_out = _speak(out_dir, seed, size)
    _say(f"speech: {len(clips)} clips, and {len(held_out)} of other voices", started)
    started = time.perf_counter()
    files = _write_dialogues(out_dir, clips, held_out, seed, size)
    _say(f"dialogues: {size.train_dialogues} to train on, {size.eval_dialogues} to evaluate", started)
    started = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=_quietly_on_one_thread) as pool:
        whisper = pool.submit(_learn_to_hear, out_dir, clips, held_out, seed, size.encoder_steps)
        qwen3 = pool.submit(_learn_to_answer, out_dir, seed, size)
        report = {"audio_model": whisper.result(), "text_model": qwen3.result()}
    spelled, answered = report["audio_model"]["word_accuracy"], report["text_model"]["answer_accuracy"]
    _say(f"bases: the encoder spells {spelled:.1%} of unheard clips, the LM answers {answered:.1%} in text", started)
    (out_dir / "bases.json").write_text(json.dumps(report, indent=1) + "\n")
    return DemoPaths(*files, out_dir / "whisper-base", out_dir / "qwen3-base", report)


def _say(what: str, started: float) -> None:
    print(f"{what} ({time.perf_counter() - started:.0f} s)", flush=True)


def _speak(out_dir: Path, seed: int, size: DemoSize) -> tuple[list[Clip], list[Clip]]:
    (out_dir / "clips").mkdir(parents=True, exist_ok=True)
    utterances = [
        *draw_utterances(NUMBERS, size.train_clips, held_out=False, seed=seed),
        *draw_utterances(NUMBERS, size.eval_clips, held_out=True, seed=seed),
    ]
    names = [f"clips/train-{n:05d}.wav" for n in range(size.train_clips)]
    names += [f"clips/eval-{n:05d}.wav" for n in range(size.eval_clips)]
    write_clips(utterances, [out_dir / name for name in names])
    clips = [Clip(name, utterance.text) for name, utterance in zip(names, utterances, strict=True)]
    return clips[: size.train_clips], clips[size.train_clips :]


def _write_dialogues(
    out_dir: Path, clips: Sequence[Clip], held_out: Sequence[Clip], seed: int, size: DemoSize
) -> tuple[Path, Path, Path]:
    """The training file, the evaluation's, and the evaluation's with swapped clips."""
    train, _ = spoken_dialogues(clips, size.train_dialogues, "train", seed)
    true, swapped = spoken_dialogues(held_out, size.eval_dialogues, "eval", seed + 1)
    return (
        write_jsonl(out_dir / "train.jsonl", train),
        write_jsonl(out_dir / "eval.jsonl", true),
        write_jsonl(out_dir / "eval_swapped.jsonl", swapped),
    )


def _quietly_on_one_thread() -> None:
    torch.set_num_threads(1)
    hf_logging.disable_progress_bar()


def _learn_to_hear(
    out_dir: Path, clips: Sequence[Clip], held_out: Sequence[Clip], seed: int, num_steps: int
) -> dict[str, float]:
    sides = [([out_dir / clip.path for clip in side], [clip.word for clip in side]) for side in (clips, held_out)]
    return make_whisper_base(out_dir / "whisper-base", *sides[0], seed, num_steps=num_steps, held_out=sides[1])


def _learn_to_answer(out_dir: Path, seed: int, size: DemoSize) -> dict[str, float]:
    texts, unseen = text_dialogues(size.lm_steps * LM_BATCH, seed), text_dialogues(size.unseen_texts, seed + 1)
    return make_qwen3_base(out_dir / "qwen3-base", texts, seed, num_steps=size.lm_steps, held_out=unseen)
