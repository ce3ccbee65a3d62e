"""Nothing in a model's folder can hold a command up or fill the memory."""

import os
from pathlib import Path

import pytest

from qwhisper import files as untrusted
from qwhisper.checkpoint.manifest import check_manifest
from qwhisper.checkpoint.names import MANIFEST
from qwhisper.checkpoint.reading import choose_checkpoint
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.model.pretrained import load_config, load_feature_extractor, load_tokenizer
from qwhisper.model.processor import load_processor
from qwhisper.model.trained_folder import read_config
from tests.small import write_small_bases
from tests.trust.conftest import edit, sign


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


FILES = (
    MANIFEST, "state.json", "arguments.json", "config.json", "projector.safetensors", "optimizer.safetensors",
    "tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "encoder.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [pipe, endless])
def test_pipe_or_device_in_a_checkpoint_is_refused_at_once(checkpoint, name, change):
    change(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"{checkpoint.name}.*(no regular file|{MANIFEST})"):
        choose_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
@pytest.mark.parametrize("change", [pipe, endless])
def test_pipe_or_device_in_a_base_is_refused_at_once(tmp_path, name, change):
    _, text = write_small_bases(tmp_path)
    change(text / name)
    with pytest.raises(UsageError, match="no regular file"):
        load_config(text)


def test_sparse_file_is_not_hashed(checkpoint):
    with (checkpoint / "more.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    entry = {"sha256": "0" * 64, "bytes": 1 << 40}
    edit(checkpoint / MANIFEST, lambda v: v["files"].update({"more.safetensors": entry}))
    with pytest.raises(CheckpointError, match="it is sparse"):
        check_manifest(checkpoint)


def test_file_of_another_size_is_not_hashed(checkpoint, monkeypatch):
    monkeypatch.setattr("qwhisper.checkpoint.manifest.file_sha256", lambda path: pytest.fail(f"{path} was read"))
    edit(checkpoint / MANIFEST, lambda v: [entry.update(bytes=entry["bytes"] + 1) for entry in v["files"].values()])
    with pytest.raises(CheckpointError, match="is not what was written"):
        check_manifest(checkpoint)


@pytest.mark.parametrize("name", ["../../bases/qwen3/config.json", "/etc/passwd", "a/../config.json", ""])
def test_manifest_names_no_file_outside_its_folder(checkpoint, name):
    edit(checkpoint / MANIFEST, lambda v: v["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(CheckpointError, match="is missing"):
        check_manifest(checkpoint)


@pytest.mark.parametrize("best", ["../x", "checkpoint-1/../../x", "/tmp", "checkpoint-1\n", 1, ["checkpoint-1"]])
def test_best_checkpoint_lies_in_the_run(checkpoint, best):
    edit(checkpoint / "state.json", lambda v: v.update(best_checkpoint=best))
    sign(checkpoint)
    with pytest.raises(CheckpointError, match=r"best.checkpoint is"):
        choose_checkpoint(checkpoint.parent)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "state.json", "config.json"])
def test_file_that_is_too_large_for_its_kind_is_refused_unread(checkpoint, name):
    with (checkpoint / name).open("ab") as file:
        file.truncate(300 << 20)
    sign_as = {"sha256": "0" * 64, "bytes": 300 << 20}
    edit(checkpoint / MANIFEST, lambda v: v["files"].update({name: sign_as}))
    with pytest.raises(CheckpointError, match="more than the"):
        check_manifest(checkpoint)


def test_folder_of_countless_files_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_FILES", 20)
    for number in range(20):
        (checkpoint / f"{number}.txt").touch()
    with pytest.raises(CheckpointError, match="more than 20 files"):
        check_manifest(checkpoint)


def test_deep_json_is_refused(checkpoint):
    for name in (MANIFEST, "state.json", "config.json"):
        (checkpoint / name).write_text("[" * 500_000)
        with pytest.raises(CheckpointError):
            untrusted.read_json(checkpoint / name)


def test_numbers_that_fill_the_memory_are_refused(checkpoint, tmp_path):
    edit(checkpoint / "config.json", lambda v: v["text_config"].update(num_hidden_layers=10**9, layer_types=None))
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        read_config(checkpoint)
    _, text = write_small_bases(tmp_path / "own")
    edit(text / "config.json", lambda v: v.update(num_labels=10**9))
    with pytest.raises(UsageError, match="num_labels"):
        load_tokenizer(text)


@pytest.mark.parametrize("name", ["n_fft", "feature_size", "sampling_rate"])
def test_feature_extractor_that_fills_the_memory_is_refused(checkpoint, name):
    edit(checkpoint / "processor_config.json", lambda v: v["feature_extractor"].update({name: 10**10}))
    with pytest.raises(CheckpointError, match=name):
        load_processor(checkpoint)


def test_audio_tokenizer_is_never_fetched(checkpoint):
    named = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": "evil/model"}
    edit(checkpoint / "processor_config.json", lambda v: v.update(audio_tokenizer=named))
    with pytest.raises(CheckpointError, match="audio tokenizer"):
        load_processor(checkpoint)


def test_processor_with_other_lengths_than_its_model_is_refused(checkpoint):
    edit(checkpoint / "processor_config.json", lambda v: v.update(projector_stack=2))
    with pytest.raises(CheckpointError, match="its processor counts"):
        load_processor(checkpoint)


def test_feature_extractor_of_a_sound_base_is_read(tmp_path):
    audio, _ = write_small_bases(tmp_path)
    assert load_feature_extractor(audio).feature_size == 80


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "events.bin"])
def test_what_a_trainer_left_beside_a_base_does_no_harm(tmp_path, name, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_FILES", 20)
    _, text = write_small_bases(tmp_path)
    for number in range(30):
        (text / f"rng_state_{number}.pth").touch()
    with (text / name).open("wb") as file:
        file.truncate(2 << 30)
    (text / "log.pt").unlink(missing_ok=True)
    os.mkfifo(text / "log.pt")
    assert load_config(text).model_type == "qwen3"
    assert load_tokenizer(text)("a").input_ids
