"""A small model that learns to hear high from low within seconds, and dialogues whose clips belong to other texts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qwhisper.data.dialogue import Dialogue, read_dialogues
from qwhisper.data.loader import StepSamples
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.loop import train_step
from qwhisper.train.probe import ListeningProbe, ProbeState, make_probe
from qwhisper.train.session import Session
from tests.small import teach_to_read, write_dialogues, write_small_bases
from tests.train.helpers import make_run

NUM_DIALOGUES = 40  # a multiple of 20, see with_exchanged_clips
EAR_GAIN = 10  # the small encoder's random convolutions hardly tell one tone from another


def listening_arguments(folder: Path) -> TrainArguments:
    """A run on bases of which the language model reads "low" and "high", with dialogues to train and to evaluate on."""
    audio, text = write_small_bases(folder / "bases", hidden_size=64)
    teach_to_read(text, ["low", "high"], num_steps=100)
    return TrainArguments(
        train_file=str(write_dialogues(folder / "data", NUM_DIALOGUES)),
        eval_file=str(write_dialogues(folder / "data", NUM_DIALOGUES, name="eval.jsonl", first=100)),
        output_dir=str(folder / "run"),
        audio_model=str(audio),
        text_model=str(text),
        max_steps=40,
        learning_rate=3e-3,
        lora_init_scale=1.0,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        freeze_projector_steps=0,
        early_lr_steps=0,
        audio_lead_silence=0.0,
        audio_tail_silence=0.1,
        dtype="fp32",
    )


def with_exchanged_clips(path: str) -> str:
    """A file in which half of the dialogues have the clip of another one, as long as theirs but high for low.

    Whatever is heard then comes with "low" as often as with "high": pitches change with each dialogue, lengths come
    again after 5.
    """
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for record in records:
        number = int(record["id"].removeprefix("d"))
        other = number + (5 if number % 10 < 5 else -5)
        for message in record["messages"]:
            for part in message["content"]:
                if number % 20 >= 10 and isinstance(part, dict) and part["type"] == "audio":
                    part["audio"] = f"clip{other}.wav"
    exchanged = Path(path).with_name(f"exchanged-{Path(path).name}")
    exchanged.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return str(exchanged)


def train_and_probe(args: TrainArguments) -> ListeningProbe:
    """Trains `args.max_steps` steps, and gives the probe on the held-out dialogues."""
    assert args.eval_file
    return probe_of(trained_session(args), read_dialogues(args.eval_file))


def trained_session(args: TrainArguments) -> Session:
    """A session after `args.max_steps` steps, whose encoder hears better than random ones do."""
    run, samples = make_run(args)
    tower = run.executor.model.model.audio_tower
    with torch.no_grad():
        tower.conv1.weight.mul_(EAR_GAIN)
        tower.conv2.weight.mul_(EAR_GAIN)
    order = torch.randperm(len(samples) * 100, generator=torch.Generator().manual_seed(args.seed)) % len(samples)
    for indices in order.split(args.samples_per_step)[: args.max_steps]:
        train_step(run, StepSamples([samples[i] for i in indices], []))
    return run


def probe_of(run: Session, held_out: Sequence[Dialogue], **questions: Any) -> ListeningProbe:
    seed = run.args.seed
    probe = make_probe(run.executor, run.encoder, held_out, ProbeState(), first_step=1, seed=seed, **questions)
    assert probe is not None
    return probe
