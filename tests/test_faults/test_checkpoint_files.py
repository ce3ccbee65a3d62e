"""Checkpoints and bases that are not what they were: damaged, incomplete, added to, or changed since."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qwhisper.checkpoint import manifest, reading
from qwhisper.checkpoint.folders import write_checkpoint
from qwhisper.checkpoint.manifest import check_manifest, write_manifest
from qwhisper.checkpoint.names import MANIFEST, step_in_name
from qwhisper.checkpoint.reading import choose_checkpoint, newest_usable
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.model import loading, trained_folder
from qwhisper.model.processing_qwen3_audio import add_audio_token
from qwhisper.model.processor import Qwen3AudioProcessor
from qwhisper.train import session, start, state
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.run import main
from qwhisper.train.session import save_checkpoint
from tests.small import write_small_bases
from tests.test_faults.inject import outcome_of
from tests.test_faults.matrix import fault
from tests.train.helpers import checkpoint_tensors, make_run, same_bits, step

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def finished_run(bases, train_file, tmp_path_factory) -> Path:
    """The folder of a run with the checkpoints 2 and 4. To be copied, never changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    audio, text = bases
    args = TrainArguments(
        train_file=str(train_file), output_dir=str(folder), audio_model=str(audio), text_model=str(text),
        max_steps=4, save_steps=2, freeze_projector_steps=0, per_device_train_batch_size=4, learning_rate=1e-3,
    )  # fmt: skip
    assert main(args) == 0
    return folder


@pytest.fixture
def folder(finished_run, tmp_path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def resume_arguments(folder: Path, **values) -> TrainArguments:
    told = json.loads((folder / "checkpoint-4/arguments.json").read_text())
    return TrainArguments(
        **told | {"output_dir": str(folder), "resume_from_checkpoint": "latest", "max_steps": 5} | values
    )


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def without_manifest(monkeypatch) -> None:
    """Every folder that is there is taken, as in a plain trainer."""
    for name in ("check_manifest", "read_manifest"):
        monkeypatch.setattr(manifest, name, lambda folder: {"finite": True, "step": step_in_name(folder)})


def sign_again(folder: Path) -> None:
    """A manifest that fits what is there now, as somebody would make it who wants the files to be taken."""
    (folder / MANIFEST).unlink()
    write_manifest(folder, int(folder.name.split("-")[1]), True)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_passed_over_with_any_file(folder: Path, damage: Damage) -> None:
    """For every file of the newest checkpoint: with it damaged, the older one is taken and the file is named."""
    newest = folder / "checkpoint-4"
    names = files_of(newest)
    assert len(names) >= 12 and {"optimizer.safetensors", "tokenizer.json", MANIFEST} <= set(names)
    for name in names:
        whole = (newest / name).read_bytes()
        damage(newest / name)
        found, passed_over = newest_usable(folder)
        assert found == folder / "checkpoint-2", f"{name} is damaged, and nobody noticed"
        assert len(passed_over) == 1 and "checkpoint-4" in passed_over[0]
        assert name in passed_over[0] or name == MANIFEST  # whose hashes may be what is damaged
        (newest / name).write_bytes(whole)
    assert newest_usable(folder)[0] == newest


@fault(
    "a truncated file in a checkpoint, of any kind",
    of="disk",
    guarantee="it is named and never loaded; the next older checkpoint is taken",
    without=without_manifest,
)
def test_truncated_file(folder):
    assert_passed_over_with_any_file(folder, truncated)


@fault(
    "a flipped bit in a file of a checkpoint, of any kind",
    of="disk",
    guarantee="it is named and never loaded; the next older checkpoint is taken",
    without=without_manifest,
)
def test_flipped_bit(folder):
    assert_passed_over_with_any_file(folder, flipped_bit)


@fault(
    "a missing file in a checkpoint, of any kind",
    of="disk",
    guarantee="it is named; the next older checkpoint is taken",
    without=without_manifest,
)
def test_missing_file(folder):
    assert_passed_over_with_any_file(folder, Path.unlink)


@fault(
    "a sector that can't be read in a checkpoint",
    of="disk",
    guarantee="the file is named; the next older checkpoint is taken",
    without=without_manifest,
)
def test_file_that_cannot_be_read(folder, monkeypatch):
    honest = manifest.file_sha256

    def failing(path):
        if path == folder / "checkpoint-4/optimizer.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return honest(path)

    monkeypatch.setattr(manifest, "file_sha256", failing)
    found, passed_over = newest_usable(folder)
    assert found == folder / "checkpoint-2" and "optimizer.safetensors" in passed_over[0]


def lenient_manifest(monkeypatch) -> None:
    """Reads what it can of a manifest and makes up the rest."""

    def read(folder):
        try:
            return {"finite": True, "files": {}} | json.loads((folder / MANIFEST).read_text(errors="replace"))
        except ValueError:
            return {"finite": True, "files": {}}

    monkeypatch.setattr(manifest, "read_manifest", read)


@fault(
    "a damaged manifest: cut anywhere, or any of its bytes changed",
    of="disk",
    guarantee="the checkpoint is refused, or every file in it was checked all the same",
    without=lenient_manifest,
)
def test_damaged_manifest(tmp_path):
    def fill(each: Path) -> None:
        (each / "weights.safetensors").write_bytes(b"weights")
        (each / "state.json").write_bytes(b"{}")

    made = write_checkpoint(tmp_path, 1, fill, finite=False)
    whole = (made / MANIFEST).read_bytes()
    changed = [whole[:cut] for cut in range(len(whole))]
    changed += [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in (1, 32)]
    honest = json.loads(whole)
    for content in changed:
        (made / MANIFEST).write_bytes(content)
        try:
            check_manifest(made)
        except CheckpointError:
            continue
        read = manifest.read_manifest(made)
        assert (read["files"], read["finite"]) == (honest["files"], False), content


@fault(
    "a file that was put into a checkpoint",
    of="disk",
    guarantee="if it could be loaded, it is named and the checkpoint skipped; otherwise it is harmless",
    without=lambda monkeypatch: monkeypatch.setattr(manifest, "LOADED_SUFFIXES", ()),
)
def test_added_file(folder):
    (folder / "checkpoint-4/notes.txt").write_text("the good one")
    assert newest_usable(folder)[0] == folder / "checkpoint-4"
    for name in ("encoder.safetensors", "pytorch_model.bin", "added_tokens.json"):
        (folder / "checkpoint-4" / name).write_bytes(b"")
        found, passed_over = newest_usable(folder)
        assert found == folder / "checkpoint-2" and name in passed_over[0]
        (folder / "checkpoint-4" / name).unlink()


def missing_is_empty(monkeypatch) -> None:
    """As in trainers that go on without an optimizer file, moments and step count at zero."""
    monkeypatch.setattr(state, "read_tensors", lambda path: load_file(path) if path.exists() else {})
    monkeypatch.setattr(session, "check_resumable", lambda folder, parameters, state: None)


@fault(
    "an optimizer file that is missing, from the manifest as well",
    of="disk",
    guarantee="the run does not resume; exit code 6 names the file",
    without=missing_is_empty,
)
def test_missing_optimizer_file_never_resumes(folder):
    (folder / "checkpoint-4/optimizer.safetensors").unlink()
    sign_again(folder / "checkpoint-4")
    outcome = outcome_of(resume_arguments(folder))
    assert outcome.code == CheckpointError.exit_code and "optimizer.safetensors" in outcome.message


def is_refused(args) -> bool:
    """Whether a run ends because of its checkpoint."""
    try:
        main(args)
    except CheckpointError:
        return True
    except Exception:
        return False
    return False


class Payload:
    """What a pickle runs when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def unpickling(monkeypatch) -> None:
    def load(path, *args, **kwargs):
        try:
            return load_file(path)
        except Exception:
            return pickle.loads(Path(path).read_bytes())

    for module in (state, trained_folder):
        monkeypatch.setattr(module, "load_file", load)


@fault(
    "a pickle in the place of a safetensors file, with a manifest that fits",
    of="disk",
    guarantee="nothing in it is run; exit code 6",
    without=unpickling,
)
def test_pickle_is_never_loaded(folder, tmp_path):
    newest = folder / "checkpoint-4"
    names = [name for name in files_of(newest) if name.endswith(".safetensors")]
    assert len(names) == 4
    for name in names:
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        sign_again(newest)
        refused = is_refused(resume_arguments(folder))
        assert not (tmp_path / "ran").exists(), f"{name} was unpickled"
        assert refused
        (newest / name).write_bytes(whole)


def resumed_as_they_are(monkeypatch) -> None:
    monkeypatch.setattr(reading, "check_usable", check_manifest)


@fault(
    "the newest checkpoint holds weights that are not finite",
    of="disk",
    guarantee="resume and evaluation take the newest finite one, and say so",
    without=resumed_as_they_are,
)
def test_newest_is_not_finite(arguments, capsys):
    run, samples = make_run(arguments(freeze_projector_steps=0))
    for number in (1, 2):
        step(run, samples[:4])
        if number == 2:
            with torch.no_grad():
                run.groups["lora"][0].view(-1)[0] = float("nan")
        save_checkpoint(run)
    found, passed_over = newest_usable(run.log.folder)
    assert found is not None and found.name == "checkpoint-1" and "not finite" in passed_over[0]
    assert choose_checkpoint(run.log.folder).name == "checkpoint-1"
    with pytest.raises(CheckpointError, match="not finite"):
        choose_checkpoint(run.log.folder / "checkpoint-2")


@fault(
    "a base model changed since the checkpoint was written",
    of="disk",
    guarantee="the resume is refused with exit code 2, before the model is loaded",
    without=lambda monkeypatch: monkeypatch.setattr(
        loading, "same_base", lambda name, role, config, moved, access: moved or getattr(config, f"{role}_base")["name"]
    ),
)
def test_base_changed_since(arguments, tmp_path, folder):
    outcomes = []
    for file, change in (
        ("config.json", lambda text: text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')),
        ("model.safetensors", None),
    ):
        audio, text = write_small_bases(tmp_path / file)
        args = arguments(
            audio_model=str(audio),
            text_model=str(text),
            output_dir=str(tmp_path / f"{file}-run"),
            max_steps=2,
            save_steps=2,
        )
        assert main(args) == 0
        if change:
            before = (text / file).read_text()
            (text / file).write_text(change(before))
            assert (text / file).read_text() != before
        else:
            tensors = load_file(text / file)
            tensors = {name: tensor + (name == sorted(tensors)[-1]) for name, tensor in tensors.items()}
            save_file(tensors, text / file, metadata={"format": "pt"})
        outcomes.append(outcome_of(dataclasses.replace(args, max_steps=3, resume_from_checkpoint="latest")))
    assert [outcome.code for outcome in outcomes] == [UsageError.exit_code] * 2
    assert all("another model" in outcome.message for outcome in outcomes)


def processor_of_the_base(monkeypatch) -> None:
    """The tokenizer is taken from where the base lies now."""
    honest = Qwen3AudioProcessor.from_pretrained

    def from_pretrained(folder):
        processor = honest(folder)
        config = json.loads((folder / "config.json").read_text())
        processor.tokenizer = AutoTokenizer.from_pretrained(config["text_base"]["name"])
        add_audio_token(processor.tokenizer)
        return processor

    monkeypatch.setattr(Qwen3AudioProcessor, "from_pretrained", from_pretrained)


@fault(
    "the base's tokenizer changed since the checkpoint was written",
    of="disk",
    guarantee="the run continues with the tokenizer that it was trained with, to the same bits",
    without=processor_of_the_base,
)
def test_tokenizer_changed_since(arguments, tmp_path):
    audio, text = write_small_bases(tmp_path / "own")
    args = arguments(audio_model=str(audio), text_model=str(text), max_steps=1, save_steps=1)
    assert main(args) == 0
    further = dataclasses.replace(args, max_steps=2, resume_from_checkpoint="latest")
    shutil.copytree(args.output_dir, tmp_path / "honest")
    assert main(dataclasses.replace(further, output_dir=str(tmp_path / "honest"))) == 0
    tokenizer = json.loads((text / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    letters = sorted(vocabulary, key=vocabulary.get)
    tokenizer["model"]["vocab"] = {
        letter: vocabulary[other] for letter, other in zip(letters, letters[::-1], strict=True)
    }
    (text / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(further) == 0
    expected, found = (checkpoint_tensors(Path(f) / "checkpoint-2") for f in (tmp_path / "honest", args.output_dir))
    assert same_bits(expected, found) == []


@fault(
    "a run is resumed with other flags",
    of="disk",
    guarantee="a change that is possible is reported with the old value; any other is refused with exit code 2",
    without=lambda monkeypatch: monkeypatch.setattr(start, "changed_arguments", lambda args, checkpoint: {}),
)
def test_flags_changed_since(folder, capsys):
    outcome = outcome_of(resume_arguments(folder, lora_r=4))
    assert outcome.code == UsageError.exit_code and "--lora_r is 4" in outcome.message
    assert main(resume_arguments(folder, learning_rate=5e-4, projector_learning_rate=1e-3)) == 0
    assert (
        "checkpoint-4 continues with --learning_rate 0.0005 (was 0.001), --max_steps 5 (was 4)"
        in capsys.readouterr().out
    )
