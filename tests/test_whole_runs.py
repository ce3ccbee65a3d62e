"""A checkpoint that holds a whole model, since a weight of its bases changed: verified, resumed and trusted as any."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwhisper import Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor
from qwhisper.checkpoint.folders import write_checkpoint
from qwhisper.checkpoint.names import MANIFEST
from qwhisper.cli import main as cli
from qwhisper.errors import CheckpointError
from qwhisper.train.verification import verify


@pytest.fixture(scope="module")
def whole(finished_run, tmp_path_factory):
    """A whole model with its adapter, saved without a run around it."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    model = Qwen3AudioForConditionalGeneration.from_pretrained(finished_run)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.base_layer.weight.mul_(1.5)
    model.save_pretrained(folder)
    Qwen3AudioProcessor.from_pretrained(finished_run).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_of_whole(whole, finished_run):
    """A run that started from the whole model and trains its encoder."""
    run, data = whole.with_name("run"), finished_run.parent / "data/train.jsonl"
    command = ["train", "--init_from", str(whole), "--output_dir", str(run), "--train_file", str(data)]
    settings = ["--max_steps", "2", "--early_lr_steps", "0", "--freeze_projector_steps", "0", "--no_freeze_whisper"]
    assert cli([*command, *settings, "--learning_rate", "1e-2"]) == 0
    return run


@pytest.fixture
def run(run_of_whole, tmp_path):
    return shutil.copytree(run_of_whole, tmp_path / "run")


def rewrite(run, change) -> None:
    """Its newest checkpoint with another content and a manifest that fits it."""
    folder = run / "checkpoint-2"

    def fill(aside):
        shutil.copytree(folder, aside, dirs_exist_ok=True)
        (aside / MANIFEST).unlink()
        change(aside)

    write_checkpoint(run, 2, fill)


def test_a_run_of_a_whole_model_is_verified_and_resumed(run):
    proof = verify(run)
    moments = load_file(run / "checkpoint-2/optimizer.safetensors")
    trained = {name.rpartition("|")[0] for name in moments}
    assert any("lora_A" in name for name in trained) and any("audio_tower" in name for name in trained)
    saved = load_file(run / "checkpoint-2/model.safetensors") | load_file(
        run / "checkpoint-2/adapter/adapter_model.safetensors"
    )
    assert proof.tensors > len(moments) + len(saved)
    command = ["train", "--config", str(run / "config.yaml"), "--resume_from_checkpoint", "--max_steps", "3"]
    assert cli(command) == 0
    assert verify(run).folder.name == "checkpoint-3"


def test_moments_of_another_shape_are_refused_beside_a_whole_model_too(run):
    def change(folder):
        moments = load_file(folder / "optimizer.safetensors")
        name = next(name for name in moments if name.endswith("|exp_avg") and "audio_tower" in name)
        save_file(moments | {name: torch.zeros(3)}, folder / "optimizer.safetensors")

    rewrite(run, change)
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: .*audio_tower.* is float32 \[3\]"):
        verify(run)


def test_the_adapter_below_a_whole_model_must_be_the_one_of_its_state(run):
    def change(folder):
        file = folder / "adapter/adapter_model.safetensors"
        save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)

    rewrite(run, change)
    with pytest.raises(CheckpointError, match=r"adapter/adapter_model.safetensors is not the one that was saved"):
        verify(run)


def test_a_base_that_a_callback_changed_in_a_run_is_saved_verified_and_resumed(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    model = Qwen3AudioForConditionalGeneration.from_pretrained(run)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.base_layer.weight.mul_(1.5)

    def change(folder):
        model.save_pretrained(folder)
        state = json.loads((folder / "state.json").read_text()) | {"saved_with": {}}
        (folder / "state.json").write_text(json.dumps(state))

    rewrite(run, change)
    assert not (run / "checkpoint-2/projector.safetensors").exists()
    assert verify(run).folder.name == "checkpoint-2"
    command = ["train", "--config", str(run / "config.yaml"), "--resume_from_checkpoint", "--max_steps", "3"]
    assert cli(command) == 0


def test_a_whole_checkpoint_that_is_not_what_was_written_is_not_loaded(run):
    file = run / "checkpoint-2/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written"):
        Qwen3AudioForConditionalGeneration.from_pretrained(run / "checkpoint-2")


@pytest.mark.parametrize("name", ["model.safetensors", "adapter/adapter_model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_folder_without_a_manifest_holds_nobody_up(whole, tmp_path, name, capsys):
    folder = shutil.copytree(whole, tmp_path / "model")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert cli(["verify", str(folder)]) == CheckpointError.exit_code
    assert f"{name} is no regular file" in capsys.readouterr().err
    for cls in (Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor):
        with pytest.raises(CheckpointError, match="no regular file"):
            cls.from_pretrained(folder)


@pytest.mark.parametrize("change", [{"n_fft": 10**9}, {"hop_length": 0}, {"feature_size": 1 << 40}])
def test_a_processor_that_no_model_has_is_refused_by_from_pretrained_as_well(whole, tmp_path, change):
    folder = shutil.copytree(whole, tmp_path / "model")
    values = json.loads((folder / "processor_config.json").read_text())
    values["feature_extractor"] |= change
    (folder / "processor_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        Qwen3AudioProcessor.from_pretrained(folder)


def test_a_whole_model_of_an_unknown_architecture_is_a_checkpoint_error(whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"model_type": "unknown", "auto_map": {"AutoModel": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert cli(["verify", str(folder)]) == CheckpointError.exit_code
    assert "can't be loaded" in capsys.readouterr().err
