"""Verify that a checkpoint can be resumed. Nothing is written.

Checks: hashes, every saved number finite, reload, one answer, one optimizer step on the model in memory, and the checks
of a resume. A CheckpointError names the first that fails.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qwhisper.checkpoint.facts import run_arguments
from qwhisper.checkpoint.folders import checkpoints
from qwhisper.checkpoint.manifest import check_manifest
from qwhisper.checkpoint.names import MANIFEST, STATE_FILE
from qwhisper.checkpoint.reading import read_checkpoint
from qwhisper.data.dialogue import AudioClip, Dialogue, Message, read_dialogues
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.rows import Sample
from qwhisper.engine.executor import Executor
from qwhisper.errors import CheckpointError, DataError, UsageError
from qwhisper.files import files_of
from qwhisper.frames import SAMPLE_RATE
from qwhisper.infer.assistant import answer_prompts, load_chosen
from qwhisper.model.pretrained import UntrustedCodeError
from qwhisper.model.processor import encoder_of
from qwhisper.train.resume import check_resumable, saved_parameters
from qwhisper.train.state import TrainState

LOOKED_AT = 100  # first dialogues of the training file, searched for one with audio
STEP_LEARNING_RATE = 1e-3
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Proof:
    """The result of a verification.

    files: number of files that agree with the manifest; None without a manifest. dialogue: source of the dialogue used
    for the step.
    """

    folder: Path
    files: int | None
    tensors: int
    dialogue: str
    loss: float
    moved: int
    trainable: int
    answer: str

    def __str__(self) -> str:
        hashes = "no manifest, so no hashes" if self.files is None else f"{self.files} files agree with the manifest"
        return (
            f"{self.folder}: sound. {hashes}; {self.tensors} saved tensors finite; reloaded; answered {self.answer!r} "
            f"with finite logits; one step on {self.dialogue}: loss {self.loss:.4f}, gradients finite, "
            f"{self.moved} of {self.trainable} trainable tensors moved"
        )


def verify(
    checkpoint: str | Path,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    audio_model: str | None = None,
    text_model: str | None = None,
) -> Proof:
    """Verify a checkpoint, or a run: the files of all its checkpoints, then the checkpoint that would be used.

    audio_model, text_model: present paths of its bases, if they have moved. Raises CheckpointError with what failed,
    UsageError for a folder that is neither.
    """
    given = Path(os.path.abspath(checkpoint))
    bases = {"audio_model": audio_model, "text_model": text_model}
    return read_checkpoint(given, lambda folder: _prove(folder, _check_all_files(given), device, dtype, bases))


def _prove(
    folder: Path,
    files: dict[Path, int | None],
    device: str | None,
    dtype: str | torch.dtype,
    bases: dict[str, str | None],
) -> Proof:
    tensors = _check_saved_numbers(folder)
    try:
        model, processor = load_chosen(folder, device, dtype, **bases)
    except UntrustedCodeError:
        raise
    except UsageError as error:  # one of its bases
        if any(bases.values()):
            raise
        raise CheckpointError(f"{folder}: its base can't be loaded ({error})") from error
    encoder = encoder_of(processor, max_length=run_arguments(folder).get("max_length"))
    with tempfile.TemporaryDirectory() as scratch:
        sample, prompt, dialogue = _first_dialogue(folder, encoder, Path(scratch))
    answer = _answer(folder, model, encoder, prompt)
    loss, moved, trainable = _step(folder, model, encoder, sample)
    for each in (each for each, count in files.items() if count is not None):  # a resume takes the newest
        check_resumable(each, saved_parameters(model, each), TrainState.load(each))
    return Proof(folder, files[folder], tensors, dialogue, loss, moved, trainable, answer)


def _check_all_files(given: Path) -> dict[Path, int | None]:
    """`_check_files` of a checkpoint, or of each checkpoint of a run, except those that a trainer deletes at the same
    time.
    """
    files = {}
    for each in checkpoints(given) or [given]:
        try:
            files[each] = _check_files(each)
        except (CheckpointError, OSError):
            if each.is_dir():
                raise
    return files


def _check_files(folder: Path) -> int | None:
    """Number of files that agree with the manifest; None for weights saved without one."""
    if not (folder / MANIFEST).exists() and not (folder / STATE_FILE).exists():
        return None
    return len(check_manifest(folder)["files"])


def _check_saved_numbers(folder: Path) -> int:
    """Number of tensors in all weight and optimizer files, each finite."""
    count = 0
    for path in (path for name, path in files_of(folder).items() if name.endswith(".safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (no mapping)
                    count += 1
                    if not torch.isfinite(tensors.get_tensor(name)).all():
                        raise CheckpointError(f"{path}: {name} is not finite; use an older checkpoint")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error})") from error
    return count


def _first_dialogue(folder: Path, encoder: DialogueEncoder, scratch: Path) -> tuple[Sample, Sample, str]:
    """(training row, prompt of an answer, source) of the run's first dialogue with audio, or of a synthetic one."""
    saved = run_arguments(folder)
    try:
        found = read_dialogues(saved["train_file"], data_root=saved.get("data_root"), max_samples=LOOKED_AT)
        dialogue = next(dialogue for dialogue in found if dialogue.clips)
        return _encode(dialogue, encoder)
    except (KeyError, StopIteration, DataError):  # moved, changed or not recorded: use a synthetic dialogue
        return _encode(_made_dialogue(scratch), encoder)


def _encode(dialogue: Dialogue, encoder: DialogueEncoder) -> tuple[Sample, Sample, str]:
    messages = dialogue.messages
    heard = next(n for n, message in enumerate(messages) if message.clips)
    answer = next(n for n, message in enumerate(messages) if n > heard and message.role == "assistant")
    prompt = encoder.encode_prompt(messages[:answer], tools=dialogue.tools)
    return encoder.encode(dialogue), prompt, dialogue.source


def _made_dialogue(scratch: Path) -> Dialogue:
    """A second of a tone in noise, and a question about it."""
    noise = np.random.default_rng(0).normal(scale=0.01, size=SAMPLE_RATE)
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    soundfile.write(scratch / "tone.wav", (tone + noise).astype(np.float32), SAMPLE_RATE)
    messages = (
        Message("user", (AudioClip(str((scratch / "tone.wav").resolve())), "What do you hear?")),
        Message("assistant", ("A tone.",)),
    )
    return Dialogue("made", messages, "a synthetic dialogue (the training file is missing)")


def _answer(folder: Path, model, encoder: DialogueEncoder, prompt: Sample) -> str:
    def check(module: nn.Module, inputs: tuple, logits: torch.Tensor) -> None:
        if not torch.isfinite(logits).all():
            raise CheckpointError(f"{folder}: the logits of an answer are not finite")

    watched = model.lm_head.register_forward_hook(check)
    try:
        return answer_prompts(model, encoder, [prompt], ANSWER_TOKENS)[0]
    finally:
        watched.remove()


def _step(folder: Path, model, encoder: DialogueEncoder, sample: Sample) -> tuple[float, int, int]:
    """(loss, tensors that moved, trainable tensors) of one AdamW step; loss, gradients and weights must be finite."""
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in names.items()}
    model.train()
    executor = Executor(model, max_tokens_per_pack=None, pad_token_id=encoder.pad_token_id)
    loss = executor.forward_backward([sample], sample.num_supervised).loss
    if not torch.isfinite(loss):
        raise CheckpointError(f"{folder}: the loss of one step is {float(loss)}")
    _refuse_not_finite(folder, "gradient of", [(name, p.grad) for name, p in names.items() if p.grad is not None])
    torch.optim.AdamW(names.values(), lr=STEP_LEARNING_RATE, weight_decay=0.0).step()
    model.eval()
    _refuse_not_finite(folder, "weight after one step,", list(names.items()))
    moved = sum(not torch.equal(before[name], parameter) for name, parameter in names.items())
    if not moved:
        raise CheckpointError(f"{folder}: one step moved none of {len(names)} trainable tensors")
    return float(loss), moved, len(names)


def _refuse_not_finite(folder: Path, what: str, tensors: Sequence[tuple[str, torch.Tensor | nn.Parameter]]) -> None:
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: {what} {name} is not finite")
