"""`qwhisper plan`: memory and time of a training, computed before anything is loaded."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwhisper.errors import MemoryLimitError, UsageError
from qwhisper.flags import flag
from qwhisper.train.arguments import TrainArguments

if TYPE_CHECKING:
    from qwhisper.data.row_sizes import Rows
    from qwhisper.engine.plan_choice import Choice
    from qwhisper.engine.plan_memory import Job, Weights
    from qwhisper.engine.plan_sizes import AudioSize, TextSize
    from qwhisper.engine.plan_speed import Card

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    _argument_group_name = "plan"

    gpu_memory: float | None = flag(
        None, "Memory of a card in GiB, such as 32 (default: what is free on this machine's card).", above=0
    )
    num_gpus: int = flag(
        1, "Cards that share the data, each with the whole model: the time is divided, the memory is not.", at_least=1
    )
    hours: float | None = flag(
        None, "Hours of audio in the data, if there is no --train_file yet (typical clips of 8.5 s).", above=0
    )


@dataclass(frozen=True, kw_only=True)
class PlanArguments(TrainArguments, PlanFlags):
    """The flags of `train`, of which a plan needs no file."""

    train_file: str = flag("", "JSONL of dialogues to train on: lengths are read from its clips' headers.")
    output_dir: str = flag("", "Not used by a plan.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_file and self.hours is not None:
            raise UsageError("--hours is for a plan without --train_file, whose clips say how long they are: drop one")


def main(arguments: PlanArguments) -> None:
    """Print the plan. Raises UsageError for models that can't be planned, MemoryLimitError if nothing fits."""
    from qwhisper.engine.plan_choice import LONG_RUN, choose
    from qwhisper.engine.plan_speed import card_like
    from qwhisper.report.terminal import note, quieten_transformers
    from qwhisper.train.fit import expected_execution, job_of
    from qwhisper.train.plan import all_steps

    quieten_transformers()
    for sentence in arguments.notices():
        note(sentence)
    if arguments.whisper_cpu:
        note("the encoder on the CPU (--whisper_cpu) limits the speed: the estimate leaves it out")
    text, audio, in_4bit = _sizes(arguments)
    rows, count = _rows(arguments)
    total_gib, budget = _memory(arguments.gpu_memory)
    steps = all_steps(arguments, count) or LONG_RUN
    job = job_of(arguments, text, audio, in_4bit=in_4bit, execution=expected_execution(arguments, steps))
    again = text.layers if arguments.gradient_checkpointing else arguments.recomputed
    card = card_like(total_gib)
    choice = choose(
        job, rows, arguments.samples_per_step, budget, card,
        steps=steps, max_tokens_per_pack=arguments.pack_limit, recompute_layers=again,
    )  # fmt: skip
    print("\n".join([
        *_memory_lines(job, choice, budget, total_gib), "",
        *_speed_lines(arguments, job, rows, choice, count), "",
        *_alternative_lines(arguments, job, rows, budget, steps, choice, card),
    ]))  # fmt: skip


def _sizes(arguments: TrainArguments) -> "tuple[TextSize, AudioSize, bool]":
    """From a folder's config.json, the tables, or the hub's config.json; and whether the LM is saved in 4 bits."""
    from qwhisper.engine.plan_sizes import AUDIO_SIZES, TEXT_SIZES, audio_size, built_in, text_size
    from qwhisper.model.base_kinds import is_prequantised
    from qwhisper.train.plan import defaults_from_flags

    defaults = defaults_from_flags(arguments)
    text_name, audio_name = (getattr(arguments, role) or defaults[role] for role in ("text_model", "audio_model"))
    text = built_in(text_name, TEXT_SIZES) if text_name and not _is_folder(text_name) else None
    audio = built_in(audio_name, AUDIO_SIZES) if audio_name and not _is_folder(audio_name) else None
    audio = audio or _of_config("audio_model", audio_name, arguments.init_from, audio_size)
    if text is not None:
        return text, audio, False

    def with_format(config) -> "tuple[TextSize, bool]":
        return text_size(config), is_prequantised(config)

    text, in_4bit = _of_config("text_model", text_name, arguments.init_from, with_format)
    return text, audio, in_4bit


def _is_folder(name: str) -> bool:
    from pathlib import Path

    return Path(name).is_dir()


def _of_config(role: str, name: str | None, init_from: str | None, of_config):
    """name: of a base; None: the base of the checkpoint `init_from`."""
    from qwhisper.checkpoint.reading import read_checkpoint
    from qwhisper.model.base_kinds import refuse_other_kind
    from qwhisper.model.pretrained import load_config
    from qwhisper.model.trained_folder import read_config

    try:
        if name is None:
            whole = read_checkpoint(init_from or "", read_config)
            return of_config(whole.get_text_config() if role == "text_model" else whole.audio_config)
        config = load_config(name, f"--{role}")
        refuse_other_kind(config, name, f"--{role}")
        return of_config(config)
    except (ValueError, AttributeError) as error:
        raise UsageError(f"--{role} {name or init_from}: its memory can't be planned: {error}") from None


def _rows(arguments: PlanArguments) -> "tuple[Rows, int]":
    """The rows of the data and their number; typical ones, and 0 or the number that --hours makes, without a file."""
    from transformers import WhisperConfig

    from qwhisper.data.dialogue import read_dialogues
    from qwhisper.data.row_sizes import Rows, rows_of
    from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig

    if not arguments.train_file:
        rows = Rows()
        return rows, round(arguments.hours * 3600 / rows.seconds) if arguments.hours else 0
    silences = {
        name: value
        for name in ("audio_lead_silence", "audio_tail_silence")
        if (value := getattr(arguments, name)) is not None
    }
    frames = Qwen3AudioConfig(audio_config=WhisperConfig(), **silences).frames
    dialogues = read_dialogues(arguments.train_file, data_root=arguments.data_root, max_samples=arguments.max_samples)
    return rows_of(dialogues, frames, arguments.max_length), len(dialogues)


def _memory(gpu_memory: float | None) -> tuple[float, int]:
    """Memory of the card in GiB, and bytes that PyTorch may reserve of it."""
    import torch

    from qwhisper.engine.plan_memory import usable
    from qwhisper.train.fit import MARGIN

    if gpu_memory is not None:
        return gpu_memory, usable(gpu_memory)
    if not torch.cuda.is_available():
        raise UsageError("this machine has no CUDA device: give a card's memory in GiB, such as --gpu_memory 32")
    free, total = torch.cuda.mem_get_info()
    return total / GIB, int(free * MARGIN)


def _memory_lines(job: "Job", choice: "Choice", budget: int, total_gib: float) -> list[str]:
    from qwhisper.engine.plan_memory import CONTEXT

    memory = choice.memory
    again = f"{choice.recompute_layers} of {job.text.layers} layers computed again"
    lines = [f"language model in {job.weights}, packs of at most {choice.max_tokens_per_pack} tokens, {again}", ""]
    lines += [f"  {name:<34}{size / GIB:7.2f} GiB" for name, size in memory.parts.items()]
    lines.append(f"  {'reserved by PyTorch at the peak':<34}{memory.reserved / GIB:7.2f} GiB")
    lines.append(f"  {'CUDA context, beside it':<34}{CONTEXT / GIB:7.2f} GiB")
    return [*lines, f"  of a card of {total_gib:.1f} GiB, PyTorch may reserve {budget / GIB:.1f} GiB"]


def _speed_lines(arguments: PlanArguments, job: "Job", rows: "Rows", choice: "Choice", count: int) -> list[str]:
    from qwhisper.engine.plan_speed import CARDS, samples_a_second
    from qwhisper.train.plan import all_steps

    samples = all_steps(arguments, count) * arguments.samples_per_step  # 0 if nothing says how many
    samples *= arguments.num_gpus if arguments.max_steps > 0 else 1  # each card takes that many steps
    per = f"; hours for {samples} samples" if samples else "; --train_file or --hours also gives the time of a run"
    data = f"{rows.tokens:.0f} tokens and {rows.seconds:.1f} s of audio a sample"
    lines = [f"estimated speed with {arguments.num_gpus} of these cards ({data}{per}):", ""]
    lines.append(f"  {'card':<12}{'samples/s':>10}{'audio hours an hour':>21}" + (f"{'hours':>8}" if samples else ""))
    for card in CARDS:
        if choice.memory.on_card > card.gib * GIB or (job.weights == "fp8" and not card.has_fp8):
            lines.append(f"  {card.name:<12}{'does not fit' if job.weights != 'fp8' or card.has_fp8 else 'no fp8':>12}")
            continue
        fast = samples_a_second(
            job, rows, choice.tokens, choice.recompute_layers, card, arguments.samples_per_step, arguments.num_gpus
        )
        hours = f"{samples / fast / 3600:8.1f}" if samples else ""
        lines.append(f"  {card.name:<12}{fast:10.1f}{fast * rows.seconds:21.0f}{hours}")
    return lines


def _alternative_lines(
    arguments: PlanArguments, job: "Job", rows: "Rows", budget: int, steps: int, chosen: "Choice", card: "Card"
) -> list[str]:
    """Each number format with no, some (as planned for it) and all layers computed again."""
    from qwhisper.engine.plan_choice import choose
    from qwhisper.engine.plan_speed import samples_a_second

    lines = [f"alternatives (samples/s on one {card.name}; * as above):", ""]
    lines.append(f"  {'weights':<9}{'computed again':>15}{'tokens a pack':>15}{'peak, GiB':>11}{'samples/s':>11}")
    formats: tuple[Weights, ...] = ("bf16", "fp8", "nf4") if job.dtype == "bf16" else (job.dtype, "nf4")
    for weights in formats:
        other = replace(job, weights=weights)
        seen = set()
        for again in (0, None, job.text.layers):
            try:
                found = choose(
                    other, rows, arguments.samples_per_step, budget, card, steps=steps, recompute_layers=again
                )
            except MemoryLimitError:
                if again is not None:
                    lines.append(f"  {weights:<9}{again:>15}{'does not fit':>15}")
                continue
            if found.recompute_layers in seen:
                continue
            seen.add(found.recompute_layers)
            mark = "*" if weights == job.weights and found == chosen else ""
            runs = weights != "fp8" or card.has_fp8
            fast = samples_a_second(other, rows, found.tokens, found.recompute_layers, card, arguments.samples_per_step)
            per_s = f"{fast:11.1f}" if runs else f"{'no fp8':>11}"
            peak = found.memory.reserved / GIB
            lines.append(
                f"  {weights:<9}{found.recompute_layers:>15}{found.max_tokens_per_pack:>15}{peak:>11.1f}{per_s} {mark}"
            )
    return [line.rstrip() for line in lines]
