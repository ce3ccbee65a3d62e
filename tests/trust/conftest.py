"""A checkpoint of a test's own, to be changed as an attacker may."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from qwhisper.checkpoint.manifest import write_manifest
from qwhisper.checkpoint.names import MANIFEST


@pytest.fixture
def checkpoint(finished_run, tmp_path) -> Path:
    """A checkpoint for one test, with its bases in a folder beside it."""
    shutil.copytree(finished_run.parent / "bases", tmp_path / "bases")
    run = shutil.copytree(finished_run, tmp_path / "run")
    for folder in run.glob("checkpoint-*"):
        edit(folder / "config.json", lambda config: [
            config[f"{role}_base"].update(name=str(tmp_path / "bases" / name))
            for role, name in (("audio", "whisper"), ("text", "qwen3"))
        ])  # fmt: skip
        sign(folder)
    return run / "checkpoint-2"


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """A file that is there once any code of `plant_code` has run. A question on stdin is answered with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))
    return tmp_path / "ran"


def edit(file: Path, change) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    change(values)
    file.write_text(json.dumps(values))


def sign(folder: Path) -> None:
    """A manifest that fits what is there now, as an attacker writes it."""
    (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(folder, int(folder.name.split("-")[1]), True)
