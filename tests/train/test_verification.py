import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwhisper.checkpoint.folders import write_checkpoint
from qwhisper.cli import main as cli
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.train.verification import verify

WEIGHTS = ("adapter_model.safetensors", "projector.safetensors", "optimizer.safetensors")


@pytest.fixture
def run(finished_run, tmp_path):
    """A run folder of the test's own."""
    return shutil.copytree(finished_run, tmp_path / "run")


def rewritten(checkpoint, change):
    """The checkpoint with its files changed by `change(folder)` and a manifest that fits them."""

    def fill(folder):
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        change(folder)

    return write_checkpoint(checkpoint.parent, int(checkpoint.name.split("-")[1]), fill)


def change_tensor(file: str, value: float):
    def change(folder):
        tensors = load_file(folder / file)
        name = next(name for name in sorted(tensors) if tensors[name].ndim > 1)
        tensors[name].flatten()[0] = value
        save_file(tensors, folder / file)

    return change


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_sound_checkpoint_is_proved_and_nothing_is_written(run, capsys):
    before = contents(run)
    assert cli(["verify", str(run / "checkpoint-1")]) == 0
    said = capsys.readouterr().out.strip()
    assert contents(run) == before
    assert len(said.splitlines()) == 1
    assert "checkpoint-1: sound" in said
    assert "train.jsonl:1: loss" in said


def test_proof_counts_what_it_saw(run):
    proof = verify(run)
    manifest = json.loads((run / "checkpoint-2/manifest.json").read_text())
    saved = sum(len(load_file(path)) for path in (run / "checkpoint-2").glob("*.safetensors"))
    assert proof.folder == run / "checkpoint-2"
    assert (proof.files, proof.tensors) == (len(manifest["files"]), saved)
    trained = sum(len(load_file(run / "checkpoint-2" / file)) for file in WEIGHTS[:2])
    assert 0 < proof.moved <= proof.trainable == trained
    assert proof.loss > 0


@pytest.mark.parametrize("file", [*WEIGHTS, "config.json", "tokenizer.json"])
def test_flipped_bit_is_refused(run, file):
    path = run / "checkpoint-2" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"checkpoint-2: {file} is not what was written") as caught:
        verify(run / "checkpoint-2")
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("file", [*WEIGHTS, "processor_config.json", "manifest.json"])
def test_missing_file_is_refused(run, file, capsys):
    (run / "checkpoint-2" / file).unlink()
    assert cli(["verify", str(run / "checkpoint-2")]) == 6
    assert file in capsys.readouterr().err


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_number_that_is_not_finite_is_refused_though_its_hash_is_right(run, file, value):
    rewritten(run / "checkpoint-2", change_tensor(file, value))
    with pytest.raises(CheckpointError, match=rf"checkpoint-2/{file}: .* is not finite"):
        verify(run / "checkpoint-2")


def test_finite_weights_that_overflow_are_refused(run):
    def change(folder):
        tensors = load_file(folder / "projector.safetensors")
        save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, folder / "projector.safetensors")

    rewritten(run / "checkpoint-2", change)
    with pytest.raises(CheckpointError, match="the logits of an answer are not finite"):
        verify(run)


def test_weights_of_another_shape_are_refused(run):
    def change(folder):
        tensors = load_file(folder / "projector.safetensors")
        save_file(
            {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}, folder / "projector.safetensors"
        )

    rewritten(run / "checkpoint-2", change)
    with pytest.raises(CheckpointError, match="do not fit this model"):
        verify(run)


def test_base_that_has_gone_is_named(run):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["text_base"]["name"] = "/nowhere/qwen3"
        (folder / "config.json").write_text(json.dumps(config))

    rewritten(run / "checkpoint-2", change)
    with pytest.raises(CheckpointError, match="/nowhere/qwen3"):
        verify(run)


def test_damage_anywhere_in_a_run_is_refused(run):
    (run / "checkpoint-1/state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"checkpoint-1: state\.json is not what was written"):
        verify(run)
    assert verify(run / "checkpoint-2").folder.name == "checkpoint-2"


def test_without_its_training_file_a_made_dialogue_serves(run):
    def change(folder):
        told = json.loads((folder / "arguments.json").read_text())
        (folder / "arguments.json").write_text(json.dumps(told | {"train_file": str(run / "gone.jsonl")}))

    rewritten(run / "checkpoint-2", change)
    proof = verify(run)
    assert "synthetic dialogue" in proof.dialogue
    assert proof.moved > 0


def test_saved_model_without_a_manifest_is_verified_without_hashes(run, tmp_path):
    kept = ("manifest.json", "state.json", "optimizer.safetensors", "arguments.json")
    folder = shutil.copytree(run / "checkpoint-2", tmp_path / "exported", ignore=shutil.ignore_patterns(*kept))
    proof = verify(folder)
    assert proof.files is None
    assert "no manifest" in str(proof)


def test_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UsageError):
        verify(tmp_path)
