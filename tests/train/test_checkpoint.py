import json

import pytest

from qwhisper.errors import CheckpointError, UsageError
from qwhisper.train.checkpoint import (
    check_manifest,
    checkpoints,
    newest_valid,
    resolve_checkpoint,
    rotate,
    write_checkpoint,
)


def fill(folder, best=None):
    (folder / "a.bin").write_bytes(b"weights" * 100)
    (folder / "state.json").write_text(json.dumps({"best_checkpoint": best}))


def test_what_is_written_is_whole(tmp_path):
    folder = write_checkpoint(tmp_path, 10, fill)
    check_manifest(folder)
    assert folder.name == "checkpoint-10" and [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.unlink(),
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(b"x" + p.read_bytes()[1:]),
    ],
)
@pytest.mark.parametrize("file", ["a.bin", "state.json"])
def test_missing_shortened_or_changed_file_is_named(tmp_path, damage, file):
    folder = write_checkpoint(tmp_path, 1, fill)
    damage(folder / file)
    with pytest.raises(CheckpointError, match=file):
        check_manifest(folder)


def test_failed_write_leaves_nothing_that_looks_like_a_checkpoint(tmp_path):
    write_checkpoint(tmp_path, 1, fill)

    def full_disk(folder):
        (folder / "a.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, 2, full_disk)
    assert newest_valid(tmp_path)[0].name == "checkpoint-1"


def test_rewriting_a_step_replaces_it(tmp_path):
    write_checkpoint(tmp_path, 1, fill)
    folder = write_checkpoint(tmp_path, 1, lambda p: (p / "b.bin").write_bytes(b"other"))
    assert sorted(p.name for p in folder.iterdir()) == ["b.bin", "manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_newest_valid_passes_over_damaged_ones(tmp_path):
    for step in (2, 10, 9):
        write_checkpoint(tmp_path, step, fill)
    (tmp_path / "checkpoint-10/manifest.json").write_text("{")
    folder, damaged = newest_valid(tmp_path)
    assert folder.name == "checkpoint-9" and len(damaged) == 1 and "checkpoint-10" in damaged[0]


def test_rotation_keeps_the_newest_and_the_protected(tmp_path):
    for step in range(1, 7):
        write_checkpoint(tmp_path, step, fill)
    rotate(tmp_path, 2, {"checkpoint-3"})
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-5", "checkpoint-6"]


def test_run_folder_resolves_to_its_best_checkpoint_else_its_newest(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, fill)
    assert resolve_checkpoint(tmp_path).name == "checkpoint-2"
    write_checkpoint(tmp_path, 3, lambda p: fill(p, best="checkpoint-1"))
    assert resolve_checkpoint(tmp_path).name == "checkpoint-1"
    with pytest.raises(UsageError, match="no such folder"):
        resolve_checkpoint(tmp_path / "nowhere")


def test_a_damaged_checkpoint_is_not_resolved(tmp_path):
    write_checkpoint(tmp_path, 1, fill)
    write_checkpoint(tmp_path, 2, lambda p: fill(p, best="checkpoint-1"))
    (tmp_path / "checkpoint-1/a.bin").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        resolve_checkpoint(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-2/manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        resolve_checkpoint(tmp_path / "checkpoint-2")
