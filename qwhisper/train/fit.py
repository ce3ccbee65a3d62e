"""Fits a training to the memory of its card: what `auto` of --max_tokens_per_pack and --recompute_layers becomes.

The arithmetic is in `engine/plan_memory.py` and `engine/plan_choice.py`; `qwhisper plan` prints it before a run.
"""

from collections.abc import Sequence
from typing import get_args

import torch

from qwhisper.data.dialogue import Dialogue
from qwhisper.data.row_sizes import rows_of
from qwhisper.engine.compiled import why_not_compiled
from qwhisper.engine.executor import supports_packing
from qwhisper.engine.plain import why_plain
from qwhisper.engine.plan_choice import Choice, choose
from qwhisper.engine.plan_memory import GIB, Execution, Job, Weights
from qwhisper.engine.plan_sizes import AudioSize, TextSize, audio_size, text_size
from qwhisper.engine.plan_speed import Card, card_called
from qwhisper.errors import MemoryLimitError
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.report.terminal import note, say
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.models import has_dropout, num_layers, recompute_first_layers, recomputed_layers
from qwhisper.train.state import TrainState

SHORT_RUN = 200  # steps; compiling takes a minute, and saves at least a third of a step's time
MARGIN = 0.98  # of the free memory is planned with: memory is lost between blocks, and other processes need some


def fit_to_memory(
    model: Qwen3AudioForConditionalGeneration,
    args: TrainArguments,
    dialogues: Sequence[Dialogue],
    state: TrainState,
    total_steps: int,
) -> None:
    """Decide what is `auto`, apply it to the model, and keep it in `state`, with which a resume does the same.

    Does nothing but that if the flags or the resumed checkpoint have both values, or unless all of the model is on one
    CUDA device. If no plan fits, the run tries with the least memory: a plan can be wrong.
    """
    if args.gradient_checkpointing or args.recomputed is not None:
        state.recompute_layers = recomputed_layers(model)
    limit = state.max_tokens_per_pack or args.pack_limit
    if (limit is None or state.recompute_layers is None) and (room := room_on_card(model)) is not None:
        execution = possible_execution(model, args, total_steps, state.execution)
        choice = planned(model, args, dialogues, room, limit, state.recompute_layers, total_steps, execution)
        if choice is not None:
            state.max_tokens_per_pack, state.recompute_layers = choice.max_tokens_per_pack, choice.recompute_layers
    state.recompute_layers = state.recompute_layers or 0
    if recomputed_layers(model) != state.recompute_layers:  # transformers' hooks may be added only once
        recompute_first_layers(model, state.recompute_layers, args)


def planned(
    model: Qwen3AudioForConditionalGeneration,
    args: TrainArguments,
    dialogues: Sequence[Dialogue],
    room: tuple[int, Card],
    max_tokens_per_pack: int | None,
    recompute_layers: int | None,
    total_steps: int,
    execution: Execution,
) -> Choice | None:
    """The plan for this model, said in a line; None for an architecture that can't be planned. room: as
    `room_on_card` gives it. max_tokens_per_pack, recompute_layers: as in `choose`.
    """
    config, (free, card) = model.config, room
    try:
        job = job_of(
            args,
            text_size(config.get_text_config()),
            audio_size(config.audio_config),
            lora_r=lora_rank(model),
            in_4bit=getattr(model, "is_loaded_in_4bit", False),
            dropout=has_dropout(model),
            execution=execution,
        )
    except ValueError as error:
        note(f"the memory of this language model can't be planned: {error}")
        return None
    rows = rows_of(dialogues, config.frames, args.max_length)
    given = {"max_tokens_per_pack": max_tokens_per_pack, "recompute_layers": recompute_layers}
    try:
        choice = choose(job, rows, args.samples_per_step, int(MARGIN * free), card, steps=total_steps, **given)
    except MemoryLimitError as error:
        note(f"planned: {error}; trying with all layers computed again")
        least = {
            "max_tokens_per_pack": max_tokens_per_pack or rows.longest,
            "recompute_layers": num_layers(model) if recompute_layers is None else recompute_layers,
        }
        return choose(job, rows, 1, 2**62, card, **least)
    say(
        f"planned: packs of at most {choice.max_tokens_per_pack} tokens, {choice.recompute_layers} of "
        f"{job.text.layers} layers computed again; expected peak {choice.memory.reserved / GIB:.1f} GiB of "
        f"{free / GIB:.1f} GiB that are free"
    )
    return choice


def wanted_execution(args: TrainArguments, total_steps: int, before: str | None = None) -> Execution:
    """What --execution asks for if nothing stands in the way. before: what a resumed run did."""
    asked = before or args.execution
    if asked in get_args(Execution):
        return asked  # type: ignore[return-value]
    # A compiler may choose another order of sums in a resumed run, whose first pack has another shape.
    return "plain" if total_steps < SHORT_RUN or args.deterministic else "captured"


def expected_execution(args: TrainArguments, total_steps: int) -> Execution:
    """What a run on a GPU will do, as far as its flags say."""
    return "plain" if args.whisper_cpu or args.manual_loss else wanted_execution(args, total_steps)


def possible_execution(
    model: Qwen3AudioForConditionalGeneration, args: TrainArguments, total_steps: int, before: str | None
) -> Execution:
    """What `train.execution` will choose, unless a callback adds a hook. before: as in `wanted_execution`."""
    wanted = wanted_execution(args, total_steps, before)
    packing = supports_packing(model.config.get_text_config())
    if wanted != "plain" and (why_plain(model, manual_loss=args.manual_loss, packing=packing) or why_not_compiled()):
        return "plain"
    return wanted


def job_of(
    args: TrainArguments,
    text: TextSize,
    audio: AudioSize,
    *,
    lora_r: int | None = None,
    in_4bit: bool = False,
    dropout: bool = False,
    execution: Execution = "plain",
) -> Job:
    """lora_r: of the model, if it is not that of the flags. in_4bit: the LM is saved so. dropout: in the LM itself.
    --dtype auto is bf16, as on a GPU.
    """
    dtype = "bf16" if args.dtype == "auto" else args.dtype
    weights: Weights = "fp8" if args.load_in_fp8 else "nf4" if args.load_in_4bit or in_4bit else dtype
    return Job(
        text=text,
        audio=audio,
        weights=weights,
        dtype=dtype,
        lora_r=(args.lora_r if args.use_lora else 0) if lora_r is None else lora_r,
        lora_targets=tuple(args.lora_target_modules) if args.lora_target_modules else None,
        lora_fp32=args.lora_fp32,
        projector_fp32=args.projector_fp32,
        freeze_whisper=args.freeze_whisper,
        whisper_cpu=args.whisper_cpu,
        distils=args.distill_weight > 0,
        dropout=dropout or args.lora_dropout > 0,
        execution=execution,
    )


def lora_rank(model: Qwen3AudioForConditionalGeneration) -> int:
    """Of the model's adapter, which --init_from may have brought; 0 without one."""
    configs = getattr(model, "peft_config", None) or {}
    return max((config.r for config in configs.values()), default=0)


def room_on_card(model: Qwen3AudioForConditionalGeneration) -> tuple[int, Card] | None:
    """(bytes that PyTorch has or may still get, the card); None unless the LM is whole on one CUDA device.

    Counts what other processes hold as not free, and a limit set by `set_per_process_memory_fraction`.
    """
    devices = {parameter.device for parameter in model.model.language_model.parameters()}
    device = next(iter(devices))
    if len(devices) > 1 or device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    card = card_called(torch.cuda.get_device_name(device), total / GIB)
    return int(min(free + torch.cuda.memory_reserved(device), allowed)), card
