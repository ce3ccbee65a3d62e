import json
import shutil
import subprocess
import sys

import pytest

from qwhisper.checkpoint import folders, manifest
from qwhisper.checkpoint.folders import checkpoints, put_aside_later, rotate, write_checkpoint
from qwhisper.checkpoint.manifest import check_manifest, check_usable
from qwhisper.checkpoint.reading import choose_checkpoint, newest_usable
from qwhisper.errors import CheckpointError, UsageError


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
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_error_of_the_disk_is_one_whichever_library_reports_it(tmp_path):
    def foreign(folder):
        raise RuntimeError("No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space") as caught:
        write_checkpoint(tmp_path, 1, foreign)
    assert caught.value.errno == 28

    def our_own_fault(folder):
        raise RuntimeError("a parameter has no name")

    with pytest.raises(RuntimeError, match="no name"):
        write_checkpoint(tmp_path, 1, our_own_fault)


def test_the_writer_imports_no_torch():
    told = "import sys, qwhisper.checkpoint.folders; print({'torch', 'numpy', 'transformers'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", told], text=True).strip() == "set()"


def test_rewriting_a_step_replaces_it(tmp_path):
    write_checkpoint(tmp_path, 1, fill)
    folder = write_checkpoint(tmp_path, 1, lambda p: (p / "b.bin").write_bytes(b"other"))
    assert sorted(p.name for p in folder.iterdir()) == ["b.bin", "manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_newest_valid_passes_over_damaged_ones(tmp_path):
    for step in (2, 10, 9):
        write_checkpoint(tmp_path, step, fill)
    (tmp_path / "checkpoint-10/manifest.json").write_text("{")
    folder, damaged = newest_usable(tmp_path)
    assert folder.name == "checkpoint-9" and len(damaged) == 1 and "checkpoint-10" in damaged[0]


def test_rotation_keeps_the_newest_and_the_protected(tmp_path):
    for step in range(1, 7):
        write_checkpoint(tmp_path, step, fill)
    rotate(tmp_path, 2, {"checkpoint-3"})
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-5", "checkpoint-6"]


def test_rotation_keeps_the_newest_finite_one(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step, fill, finite=step < 3)
    rotate(tmp_path, 1, set())
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_one_that_is_not_finite_is_passed_over_and_said_so(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, fill, finite=step < 2)
    folder, passed_over = newest_usable(tmp_path)
    assert folder.name == "checkpoint-1" and len(passed_over) == 1 and "not finite" in passed_over[0]
    check_manifest(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match="not finite"):
        check_usable(tmp_path / "checkpoint-2")


def test_what_a_killed_save_left_is_no_checkpoint_and_is_cleared_by_the_next(tmp_path):
    write_checkpoint(tmp_path, 1, fill)
    for name in (".checkpoint-2.writing", ".checkpoint-0.deleting", ".checkpoint-1.old"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1"]
    write_checkpoint(tmp_path, 2, fill)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_one_that_was_about_to_be_replaced_counts_until_it_is(tmp_path):
    write_checkpoint(tmp_path, 1, fill).rename(tmp_path / ".checkpoint-1.old")
    assert newest_usable(tmp_path) == (tmp_path / ".checkpoint-1.old", [])
    assert choose_checkpoint(tmp_path) == tmp_path / ".checkpoint-1.old"
    write_checkpoint(tmp_path, 2, fill)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_files_in_subfolders_are_checked_too(tmp_path):
    def nested(folder):
        (folder / "inner").mkdir()
        (folder / "inner/a.bin").write_bytes(b"weights")

    folder = write_checkpoint(tmp_path, 1, nested)
    check_manifest(folder)
    (folder / "inner/a.bin").write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"inner/a\.bin"):
        check_manifest(folder)


def test_one_under_another_steps_name_is_not_taken_for_it(tmp_path):
    write_checkpoint(tmp_path, 3, fill)
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-100")
    folder, passed_over = newest_usable(tmp_path)
    assert folder == tmp_path / "checkpoint-3" and "of step 3, not 100" in passed_over[0]
    with pytest.raises(CheckpointError, match="rename it to checkpoint-3"):
        choose_checkpoint(tmp_path / "checkpoint-100")


@pytest.mark.parametrize("name", ["checkpoint-²", "checkpoint-3.old", "checkpoint-", "checkpoint-3b"])
def test_other_names_are_no_checkpoints(tmp_path, name):
    write_checkpoint(tmp_path, 3, fill)
    (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-3"]


def test_one_that_lies_elsewhere_and_is_linked_is_rotated_away_alone(tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    write_checkpoint(run, 1, fill).rename(disk)
    (run / "checkpoint-1").symlink_to(disk)
    for step in (2, 3):
        write_checkpoint(run, step, fill)
        rotate(run, 1, set())
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint-3"]
    check_manifest(disk)


def test_what_the_disk_does_not_let_go_of_is_in_no_saves_way(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.shutil, "rmtree", lambda path, ignore_errors: None)
    for step in (1, 2, 3):
        (tmp_path / f".checkpoint-{step}.writing").mkdir()
        (tmp_path / f".checkpoint-{step}.deleting").mkdir()
        write_checkpoint(tmp_path, step, fill)
        rotate(tmp_path, 1, set())
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-3"]


def test_later_ones_than_a_copy_are_put_aside(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / "run", step, fill)
    shutil.copytree(tmp_path / "run/checkpoint-1", tmp_path / "copy")
    (tmp_path / "run/aside-checkpoint-3").mkdir()
    renamed = put_aside_later(tmp_path / "run", tmp_path / "copy")
    assert [p.name for p in renamed] == ["aside-checkpoint-2", "aside-checkpoint-3-1"]
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def test_a_checkpoint_is_hashed_once(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, lambda folder: fill(folder, best="checkpoint-1"))
    hashed = []
    honest = manifest.file_sha256
    monkeypatch.setattr(manifest, "file_sha256", lambda path: hashed.append(path.name) or honest(path))
    assert choose_checkpoint(tmp_path).name == "checkpoint-1"
    assert sorted(hashed) == ["a.bin", "state.json"]


def test_run_folder_resolves_to_its_best_checkpoint_else_its_newest(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, fill)
    assert choose_checkpoint(tmp_path).name == "checkpoint-2"
    write_checkpoint(tmp_path, 3, lambda p: fill(p, best="checkpoint-1"))
    assert choose_checkpoint(tmp_path).name == "checkpoint-1"
    with pytest.raises(UsageError, match="no such folder"):
        choose_checkpoint(tmp_path / "nowhere")


def test_a_damaged_checkpoint_is_not_resolved(tmp_path):
    write_checkpoint(tmp_path, 1, fill)
    write_checkpoint(tmp_path, 2, lambda p: fill(p, best="checkpoint-1"))
    (tmp_path / "checkpoint-1/a.bin").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        choose_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        choose_checkpoint(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-2/manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        choose_checkpoint(tmp_path / "checkpoint-2")


def test_checkpoint_without_its_manifest_is_not_taken_for_a_saved_model(tmp_path):
    folder = write_checkpoint(tmp_path, 10, fill)
    (folder / "projector.safetensors").touch()
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        choose_checkpoint(folder)
