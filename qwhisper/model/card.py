"""The model card, README.md: training data, recipe and losses of a model, its bases with licences, how to load it.

What is not known is left out. A README.md that somebody else wrote is never replaced.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwhisper.checkpoint.facts import run_arguments
from qwhisper.checkpoint.names import step_in_name
from qwhisper.errors import QwhisperError
from qwhisper.model.bases import find_file
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig

CARD = "README.md"
MARK = "<!-- Written by qwhisper. Delete this line to keep your own text when the model is saved again. -->"
RECIPE = (
    "learning_rate", "projector_learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "use_lora", "lora_r", "lora_alpha", "freeze_whisper", "load_in_4bit",
    "load_in_fp8", "train_on", "audio_lead_silence", "audio_tail_silence", "seed",
)  # fmt: skip
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
METRICS = ("loss", "eval_loss")


@dataclass(frozen=True)
class Origin:
    """What is known of the run that trained a model: its arguments, step and losses. Empty without a run."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    losses: Mapping[str, float] = field(default_factory=dict)


def origin_of(folder: str | os.PathLike) -> Origin:
    """Read from a checkpoint's arguments.json and the metrics.jsonl of its run."""
    checkpoint = Path(folder)
    arguments, step = run_arguments(checkpoint), step_in_name(checkpoint)
    return Origin(arguments, step, _losses(checkpoint.parent / "metrics.jsonl", step)) if arguments else Origin()


def _losses(file: Path, step: int | None) -> dict[str, float]:
    found: dict[str, float] = {}
    if not file.is_file():
        return found
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # cut by a full disk
            continue
        if isinstance(values, dict) and values.get("step") == step:
            found |= {name: values[name] for name in METRICS if isinstance(values.get(name), float)}
    return found


def write_card(config: Qwen3AudioConfig, origin: Origin, folder: Path) -> None:
    """Write README.md, unless there is one without our mark."""
    file = folder / CARD
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return
    file.write_text(_text(config, origin), encoding="utf-8")


def _text(config: Qwen3AudioConfig, origin: Origin) -> str:
    # A whole model's configuration names no bases, but its run does.
    stored = [base["name"] if base else None for base in (config.audio_base, config.text_base)]
    bases = [
        name or origin.arguments.get(f"{role}_model") for role, name in zip(("audio", "text"), stored, strict=True)
    ]
    named = [(role, str(name)) for role, name in zip(("audio", "text"), bases, strict=True) if name]
    licences = {name: _licence(name) for _, name in named}
    return "\n\n".join(
        [
            _front_matter([name for _, name in named], set(licences.values())),
            MARK,
            "# A language model that listens",
            "A Whisper encoder, a trained projector and a causal language model, joined by qwhisper: it answers speech "
            "and text with text.",
            "## Load\n\n```python\nimport qwhisper\nfrom transformers import pipeline\n\n"
            'answer = pipeline("any-to-any", model="<this folder or repository>")\n'
            'chat = [{"role": "user", "content": [{"type": "audio", "audio": "question.wav"}]}]\n'
            "print(answer(text=chat, max_new_tokens=64, return_full_text=False)[0][\"generated_text\"])\n```",
            *_section("Bases", [f"{role}: {_shown(name)}, licence: {licences[name]}" for role, name in named]),
            *_until(origin),
            *_section("Training data", _data(origin)),
            *_section("Recipe", [f"{name}: {origin.arguments[name]}" for name in RECIPE if name in origin.arguments]),
            *_section(
                f"Losses at step {origin.step}", [f"{name}: {value:.4g}" for name, value in origin.losses.items()]
            ),
        ]
    ) + "\n"  # fmt: skip


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines)] if lines else []


def _until(origin: Origin) -> list[str]:
    if origin.step is None:
        return []
    return [f"The sections below describe a run of qwhisper up to step {origin.step}. Later training is not listed."]


def _data(origin: Origin) -> list[str]:
    files = {name: origin.arguments.get(name) for name in ("train_file", "eval_file")}
    return [f"{name}: {Path(file).name}" for name, file in files.items() if isinstance(file, str)]


def _front_matter(names: list[str], licences: set[str]) -> str:
    lines = ["library_name: transformers", "pipeline_tag: any-to-any", "tags: [qwhisper, audio, speech]"]
    hub = [name for name in names if HUB_ID.fullmatch(name)]
    lines += ["base_model:", *(f"- {name}" for name in hub)] if hub else []
    (licence,) = licences if len(licences) == 1 else ("",)
    lines += [f"license: {licence}"] if re.fullmatch(r"[\w.-]+", licence) else []
    return "\n".join(["---", *lines, "---"])


def _shown(name: str) -> str:
    """A hub id, or the last part of a path: the rest of a path is private."""
    return name if HUB_ID.fullmatch(name) else re.split(r"[\\/]+", name.rstrip("\\/"))[-1]


def _licence(name: str) -> str:
    """As the base's own card says, if that is on this computer."""
    try:
        card = find_file(name, CARD, local_files_only=True)
        text = card.read_text(encoding="utf-8", errors="replace") if card is not None else ""
    except (OSError, ValueError, QwhisperError):
        text = ""
    found = re.search(r"\A---\s*\n(?:.*\n)*?license:[ \t]*([\w.-]+)[ \t]*\n", text)
    return found[1] if found else "see the base's own page"
