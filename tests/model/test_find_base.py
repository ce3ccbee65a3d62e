"""Where a base that has moved is looked for."""

import shutil

import pytest

from qwhisper.errors import UsageError
from qwhisper.model import find_base as module
from qwhisper.model.bases import fingerprint, resolve_model
from qwhisper.model.find_base import beside, find_base


@pytest.mark.parametrize(
    ("stored", "names"),
    [
        ("/home/me/project/bases/qwen3", ["qwen3", "bases/qwen3", "project/bases/qwen3"]),
        ("bases/qwen3/", ["qwen3", "bases/qwen3"]),
        ("../../qwen3", ["qwen3"]),
        ("C:\\models\\qwen3", ["qwen3", "models/qwen3", "C:/models/qwen3"]),
        ("Qwen/Qwen3-8B", ["Qwen3-8B", "Qwen/Qwen3-8B"]),
        ("", []),
    ],
)
def test_it_is_looked_for_by_name_in_the_checkpoints_folder_and_the_three_above(tmp_path, stored, names):
    checkpoint = tmp_path / "runs/run/checkpoint-2"
    checkpoint.mkdir(parents=True)
    folders = [checkpoint, checkpoint.parent, tmp_path / "runs", tmp_path]
    assert beside(checkpoint, stored) == [str(folder / name) for folder in folders for name in names]
    assert beside("someone/on-the-hub", stored) == []


def test_a_linked_checkpoint_looks_beside_the_link_and_beside_the_folder(tmp_path):
    (tmp_path / "disk/run").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link").symlink_to(tmp_path / "disk/run")
    found = beside(tmp_path / "here/link", "qwen3")
    assert {str(tmp_path / "here/qwen3"), str(tmp_path / "disk/qwen3")} <= set(found)


def test_the_stored_place_comes_first_then_the_nearest_with_the_right_fingerprint(bases, tmp_path, monkeypatch):
    text, base = bases[1], {"fingerprint": fingerprint(bases[1])}
    run = tmp_path / "run/checkpoint-1"
    run.mkdir(parents=True)
    assert find_base(run, "text", base | {"name": text}) == text
    shutil.copytree(bases[0], tmp_path / "run/qwen3")  # of the right name, and another model
    (tmp_path / "run/checkpoint-1/qwen3").mkdir()  # no model at all
    shutil.copytree(text, tmp_path / "qwen3")
    assert find_base(run, "text", base | {"name": "/gone/qwen3"}) == str(tmp_path / "qwen3")
    monkeypatch.chdir(tmp_path)  # as old checkpoints store it, relative to the current folder
    assert find_base("run/checkpoint-1", "text", base | {"name": "qwen3"}) == str(tmp_path / "qwen3")


def test_a_hub_id_is_asked_for_on_the_hub_if_no_copy_is_near_and_stays_an_id(bases, tmp_path, monkeypatch):
    asked = []

    def on_the_hub(name, hub, flag, access):
        asked.append((name, hub, flag))
        return bases[1]

    monkeypatch.setattr(module, "resolve_model", on_the_hub)
    base = {"name": "Qwen/Qwen3-8B", "fingerprint": fingerprint(bases[1])}
    assert find_base(tmp_path, "text", base) == "Qwen/Qwen3-8B"
    assert asked == [("Qwen/Qwen3-8B", "huggingface", "--text_model")]
    shutil.copytree(bases[1], tmp_path / "Qwen3-8B")
    assert find_base(tmp_path, "text", base) == str(tmp_path / "Qwen3-8B")
    assert len(asked) == 1


def test_a_path_is_never_asked_for_on_the_hub(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "resolve_model", lambda *_: pytest.fail("the hub was asked"))
    base = {"name": "/home/me/bases/qwen3", "fingerprint": fingerprint(bases[1])}
    with pytest.raises(UsageError, match=r"Looked at /home/me/bases/qwen3 .* for qwen3 or .*: give .* --audio_model"):
        find_base(tmp_path, "audio", base)


def test_a_folder_is_resolved_to_its_absolute_path(bases, tmp_path, monkeypatch):
    shutil.copytree(bases[1], tmp_path / "qwen3")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("qwen3", "huggingface", "--text_model") == str(tmp_path / "qwen3")
