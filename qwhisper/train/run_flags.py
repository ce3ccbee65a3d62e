"""The flags of `qwhisper train` that say how and where a run works, not what it learns; see `flag_sections.py`."""

from dataclasses import dataclass
from typing import Literal

from qwhisper.flags import flag, required


@dataclass(frozen=True, kw_only=True)
class ExecutionFlags:
    _argument_group_name = "execution"

    max_tokens_per_pack: str = flag(
        "auto",
        "Tokens of a pack: samples end to end in one row, which go through the model at once (auto: as many as fit "
        "into the free memory of the card, at most 8192; 8192 if the language model is on several devices, 4096 on a "
        "CPU). It changes speed and memory, not the result; out of memory halves it automatically.",
    )
    recompute_layers: str = flag(
        "auto",
        "Number of the language model's first layers whose activations are computed again in the backward pass "
        "instead of being kept: less memory, more time, the same result (auto: the number with which the free "
        "memory of the card is used best, by the planner's estimate; 0 if the language model is on several devices, "
        "and on a CPU). `qwhisper plan` shows it.",
    )
    execution: Literal["auto", "plain", "compiled", "captured"] = flag(
        "auto",
        "How packs run on a GPU: kernel by kernel (plain), with compiled layers, or with these replayed as CUDA graphs "
        "(captured; auto: this in a run of 200 steps or more without --deterministic, because compiling takes a minute "
        "or two). The result is the same up to rounding. Where it is not possible, one line says why, and packs run "
        "plain.",
    )
    gradient_checkpointing: bool = flag(
        False,
        "Recompute the activations of all of the language model's layers: less memory, more time.",
    )
    dataloader_num_workers: int = flag(
        0,
        "Processes that read audio ahead; 0 reads in the training process. A clip whose decoding kills the process or "
        "never ends is found and quarantined with 1 or more; with 0 the run itself dies or hangs.",
        at_least=0,
        at_most=1024,
        why="it is a number of processes",
    )
    seed: int = flag(42, "Decides initial weights and the order of samples.", at_least=0)
    deterministic: bool = flag(
        False, "Use only deterministic kernels on the GPU: a resumed run is then equal to the last bit. Slower."
    )


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    _argument_group_name = "run folder"

    output_dir: str = required(
        "Folder of this run. If it holds another run, it is refused, with the command that resumes that run."
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "Resume a run: from the newest sound checkpoint in --output_dir, or from the given one. If there is none, the "
        "command stops.",
        nargs="?",
        const="latest",
    )
    save_steps: int = flag(200, "Optimizer steps between checkpoints: the most that a crash can cost.", at_least=1)
    save_total_limit: int = flag(
        3, "Checkpoints kept. The last one verified finite and the best one are never deleted.", at_least=1
    )
    eval_steps: int | None = flag(None, "Optimizer steps between evaluations (default: --save_steps).", at_least=1)
    per_device_eval_batch_size: int = flag(
        8, "Samples per evaluation batch; the result does not depend on it.", at_least=1
    )
    logging_steps: int = flag(
        10, "Optimizer steps between two lines of the log; metrics.jsonl has every step.", at_least=1
    )
    report_to: list[str] = flag(
        [], "Trackers, such as tensorboard, wandb, trackio (default: none); each must be installed."
    )
    run_name: str | None = flag(None, "The run's name in the trackers (default: the name of --output_dir).")
