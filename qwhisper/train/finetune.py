"""`finetune`: a training from Python, on dialogues in memory or in a file."""

import dataclasses
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qwhisper.checkpoint.folders import checkpoints
from qwhisper.data.in_memory import DialoguesInMemory
from qwhisper.errors import UsageError
from qwhisper.nearest_flag import unknown_flag
from qwhisper.report.terminal import note
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.run import main
from qwhisper.train.state import TrainState
from qwhisper.versions import check_versions

Dialogues = str | os.PathLike | Iterable[Mapping]
DATA_FOLDER = "data"  # in a run folder, for dialogues from memory
# Flags with a separate parameter, and its name.
NAMED = {"train_file": "dialogues", "eval_file": "eval_dialogues", "output_dir": "output_dir"}


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a training. A number is None if it was not measured.

    checkpoint: the best by held-out loss, else the last; `from_pretrained` takes it. steps: optimizer steps, of which
    skipped_steps left the weights unchanged. loss: near the end of the run; held_out_loss: the last one;
    listening_gain: loss with swapped audio minus loss with the true audio; all in nats a supervised token.
    """

    checkpoint: Path
    steps: int
    skipped_steps: int
    supervised_tokens: int
    loss: float | None
    held_out_loss: float | None
    listening_gain: float | None


def finetune(
    dialogues: Dialogues,
    output_dir: str | os.PathLike,
    *,
    eval_dialogues: Dialogues | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **flags: Any,
) -> TrainResult:
    """Fine-tune as `qwhisper train` does, with the same files in `output_dir`.

    dialogues, eval_dialogues: path of a JSONL file, or dialogues in its format whose audio is a path (a relative one
    starts in the current folder), an array or bytes. Dialogues from memory are written into `output_dir`/data. The run
    can then be resumed or started again, here with the same dialogues or on the command line from its config.yaml.
    callbacks: any `TrainerCallback`s. flags: those of `qwhisper train`, such as learning_rate=1e-4.

    Raises a `qwhisper.errors.QwhisperError` where the command line ends with its exit code. Ctrl-C saves a checkpoint
    and raises KeyboardInterrupt; another signal saves a checkpoint and raises SystemExit.
    """
    check_versions(quantized=flags.get("load_in_4bit", False))
    _refuse_unknown(flags)
    folder, data_root = Path(output_dir), flags.pop("data_root", None)
    given = {"train": dialogues, "eval": eval_dialogues}
    in_memory: list[DialoguesInMemory] = []
    files: dict[str, Any] = {}
    for name, source in given.items():
        is_left_out = source is None and name == "eval"
        if isinstance(source, Mapping) or not (is_left_out or isinstance(source, str | os.PathLike | Iterable)):
            raise UsageError(
                f"the {name} dialogues are {source if source is None else type(source).__name__}; give the path of a "
                "JSONL file, or a list of dicts with `messages`"
            )
        if isinstance(source, str | os.PathLike):
            files[f"{name}_file"] = os.fspath(source)
        elif source is not None:
            in_memory.append(DialoguesInMemory.check(source, folder / DATA_FOLDER, name, data_root=data_root))
            files[f"{name}_file"] = str(in_memory[-1].path)
    args = TrainArguments(
        **flags, **files, output_dir=os.fspath(output_dir), data_root=_common_root(data_root, in_memory)
    )

    def write_data() -> None:
        for dialogues in in_memory:
            dialogues.write()
            for sentence in dialogues.notes:
                note(sentence)

    code = main(args, callbacks, write_data)
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)
    return _result(folder)


def _refuse_unknown(flags: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(TrainArguments)]
    for name in flags:
        if name in NAMED:
            raise UsageError(f"--{name} has a parameter here: give it as {NAMED[name]}")
        if name not in known:
            raise UsageError(unknown_flag(name, known, TrainArguments.NO_FLAGS, dashes="--"))


def _common_root(data_root: str | os.PathLike | None, in_memory: Sequence[DialoguesInMemory]) -> str | None:
    """The common folder of all audio files of dialogues from memory, and of `data_root` if it is given."""
    folders = {folder for dialogues in in_memory for folder in dialogues.folders}
    if data_root is not None:
        folders.add(os.path.realpath(data_root) if folders else os.fspath(data_root))
    return os.path.commonpath(folders) if folders else None


def _result(folder: Path) -> TrainResult:
    newest = checkpoints(folder)[-1]
    state = TrainState.load(newest)
    best = folder / (state.best_checkpoint or newest.name)
    return TrainResult(
        checkpoint=best if best.is_dir() else newest,
        steps=state.step,
        skipped_steps=state.skipped_steps,
        supervised_tokens=state.supervised_tokens,
        loss=state.learning.ends()[1],
        held_out_loss=state.learning.last_held_out,
        listening_gain=state.learning.gain,
    )
