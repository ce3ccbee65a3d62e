"""Resolves every `auto` and None of the flags into a plan, once.

`resolve` runs before a model is loaded, because it may refuse. `longest_dialogue` and `longest_row` need the model.
Other verbs share some values, which are decided outside `train/`: dtype and device in `model.bases.LoadOptions`,
tokens per pack in `engine.executor`, LoRA's layers in `model.lora`, the silences around a clip in the model's
configuration. `start.py` finds the checkpoint to resume.
"""

import copy
import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwhisper.errors import UsageError
from qwhisper.guards.state import CLAMP_BOUND
from qwhisper.train.arguments import TrainArguments

DEFAULT_AUDIO_MODELS = {  # by hub: the same weights
    "huggingface": "openai/whisper-large-v3-turbo",
    "modelscope": "openai-mirror/whisper-large-v3-turbo",
}
DEFAULT_TEXT_MODEL = "Qwen/Qwen3-8B"
# Steps that protect the start of a run: (default, at most this percentage of all steps).
CAREFUL_STEPS = {
    "early_lr_steps": (100, 10),
    "freeze_projector_steps": (20, 2),
}
LONGEST_WARMUP = 10  # times the run: the learning rate then reaches only a tenth of its peak


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The values of a training that its flags don't give explicitly.

    audio_model, text_model, projector_scale: None with --init_from, whose checkpoint decides. total_steps,
    num_warmup_steps, early_lr_steps, freeze_projector_steps, eval_steps: optimizer steps. clamp_bound: bound of the
    activation clamp; None: no clamp. clamp_follows_spikes: whether spikes turn it on and off. notes: sentences about
    these values for the user.
    """

    audio_model: str | None
    text_model: str | None
    projector_scale: float | None
    projector_learning_rate: float
    eval_steps: int
    run_name: str
    total_steps: int
    num_warmup_steps: int
    early_lr_steps: int
    freeze_projector_steps: int
    clamp_bound: float | None
    clamp_follows_spikes: bool
    notes: tuple[str, ...]


# Flags that are None if not given; arguments.json in a checkpoint has their values.
DECIDED_FLAGS = [
    f.name for f in dataclasses.fields(Plan) if f.name in {f.name for f in dataclasses.fields(TrainArguments)}
]


def resolve(args: TrainArguments, *, num_dialogues: int, saved: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a run over `num_dialogues` dialogues.

    If early_lr_steps or freeze_projector_steps was not given, a resumed run takes the value of its first part (`saved`,
    the arguments in the checkpoint), so that its schedule stays the same with any number of epochs. A new run takes the
    default, or a share of its steps if that is less. Raises UsageError for a warm-up of more than LONGEST_WARMUP times
    the run.
    """
    total_steps = all_steps(args, num_dialogues)
    if args.warmup_steps > LONGEST_WARMUP * total_steps:
        raise UsageError(
            f"--warmup_steps {args.warmup_steps:g}: this run has {total_steps} steps, and its learning rate would only "
            f"reach {total_steps / args.warmup_steps:.2g} of --learning_rate; a number below 1 is a share of all steps"
        )
    defaults = defaults_from_flags(args)
    careful, notes = _careful_steps_of(args, total_steps, defaults, saved or {})
    decided = defaults | careful
    bounds = {"off": None, "auto": CLAMP_BOUND}
    return Plan(
        **{name: _first_known(getattr(args, name), decided[name]) for name in DECIDED_FLAGS},
        total_steps=total_steps,
        num_warmup_steps=_share_or_count(args.warmup_steps, total_steps),
        clamp_bound=bounds[args.activation_clamp] if args.activation_clamp in bounds else float(args.activation_clamp),
        clamp_follows_spikes=args.activation_clamp == "auto",
        notes=tuple(notes),
    )


def defaults_from_flags(args: TrainArguments) -> dict[str, Any]:
    """Defaults that depend on other flags, by flag name, for a run's config.yaml."""
    from_bases = not args.init_from
    return {
        "audio_model": DEFAULT_AUDIO_MODELS[args.hub] if from_bases else None,
        "text_model": DEFAULT_TEXT_MODEL if from_bases else None,
        "projector_scale": 1.0 if from_bases else None,
        "projector_learning_rate": args.learning_rate,
        "eval_steps": args.save_steps,
        "run_name": os.path.basename(os.path.abspath(args.output_dir)),
        **({} if args.use_lora else {"freeze_projector_steps": 0}),
    }


def with_values(args: TrainArguments, values: Mapping[str, Any]) -> TrainArguments:
    """A copy of the arguments with `values` instead of None. No second check: they follow from checked flags."""
    filled = copy.copy(args)
    for name, value in values.items():
        if getattr(args, name, 0) is None:
            object.__setattr__(filled, name, value)  # the dataclass is frozen for all other code
    return filled


def all_steps(args: TrainArguments, num_dialogues: int) -> int:
    """Optimizer steps of the whole run."""
    steps_per_epoch = -(-num_dialogues // args.samples_per_step)
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)


def careful_steps(name: str, total_steps: int) -> int:
    """The default of early_lr_steps or freeze_projector_steps in a run of that length."""
    default, percent = CAREFUL_STEPS[name]
    return min(default, total_steps * percent // 100)


def longest_dialogue(args: TrainArguments, text_config) -> int:
    """Largest number of tokens in a dialogue: --max_length, else the language model's number of positions."""
    return args.max_length or text_config.max_position_embeddings


def longest_row(args: TrainArguments, max_tokens_per_pack: int) -> int:
    """Tokens in the longest row on which attention kernels are checked: --max_length, else a whole pack."""
    return args.max_length or max_tokens_per_pack


def _careful_steps_of(
    args: TrainArguments, total_steps: int, defaults: Mapping[str, Any], saved: Mapping[str, Any]
) -> tuple[dict[str, int], list[str]]:
    values: dict[str, int] = {}
    notes = []
    for name, (default, percent) in CAREFUL_STEPS.items():
        value = _first_known(getattr(args, name), defaults.get(name), saved.get(name))
        if value is None:
            value = careful_steps(name, total_steps)
            if value < default:
                notes.append(
                    f"--{name} is {value}: its default of {default}, at most {percent} % of {total_steps} steps"
                )
        values[name] = value
    return values, notes


def _first_known(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _share_or_count(steps: float, total_steps: int) -> int:
    """Number of steps; a value below 1 is a share of all steps."""
    return math.ceil(steps * total_steps) if steps < 1 else int(steps)
