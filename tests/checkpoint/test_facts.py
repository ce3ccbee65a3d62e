"""What evaluation and inference read of a checkpoint's run is checked, without the code that trains."""

import json
import subprocess
import sys

import pytest

from qwhisper.checkpoint.facts import best_checkpoint, run_arguments, trained_file_sha256, trained_kinds
from qwhisper.checkpoint.folders import write_checkpoint
from qwhisper.errors import CheckpointError

ARGUMENTS = {
    "output_dir": "/was/run", "train_file": "/was/data.jsonl", "load_in_4bit": True, "projector_fp32": False,
    "a_later_flag": 1,
}  # fmt: skip
STATE = {"step": 1, "kinds": ["colour"], "train_file_sha256": "abc", "best_checkpoint": "checkpoint-1"}


def saved(run, *, arguments=ARGUMENTS, state=STATE):
    def fill(folder):
        (folder / "arguments.json").write_text(json.dumps(arguments))
        (folder / "state.json").write_text(json.dumps(state))

    return write_checkpoint(run, 1, fill)


def test_facts_are_read_and_paths_that_moved_with_the_run_are_found(tmp_path):
    folder = saved(tmp_path / "run")
    (tmp_path / "data.jsonl").touch()
    moved = {"output_dir": str(tmp_path / "run"), "train_file": str(tmp_path / "data.jsonl")}
    assert run_arguments(folder) == ARGUMENTS | moved
    assert (trained_kinds(folder), trained_file_sha256(folder)) == (["colour"], "abc")
    assert best_checkpoint(folder) == "checkpoint-1"


def test_a_folder_that_no_run_has_saved_says_nothing(tmp_path):
    assert (run_arguments(tmp_path), trained_kinds(tmp_path), trained_file_sha256(tmp_path)) == ({}, [], None)


@pytest.mark.parametrize(
    "change",
    [{"load_in_4bit": 1}, {"load_in_fp8": "no"}, {"projector_fp32": None}, {"max_length": "many"}, {"output_dir": 3}],
)
def test_arguments_of_another_type_are_refused(tmp_path, change):
    with pytest.raises(CheckpointError, match=rf"arguments\.json: {next(iter(change))}"):
        run_arguments(saved(tmp_path, arguments=ARGUMENTS | change))


@pytest.mark.parametrize("name", ["output_dir", "load_in_4bit", "projector_fp32"])
def test_arguments_that_every_run_has_must_be_there(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        run_arguments(saved(tmp_path, arguments={k: v for k, v in ARGUMENTS.items() if k != name}))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"kinds": "colour"}, "kinds"), ({"kinds": [1]}, "kinds"), ({"step": 2}, "is of step 2, but its manifest")],
)
def test_state_that_does_not_fit_is_refused(tmp_path, change, said):
    with pytest.raises(CheckpointError, match=rf"state\.json: {said}"):
        trained_kinds(saved(tmp_path, state=STATE | change))


def test_the_package_imports_neither_torch_nor_anything_above_it():
    code = "import sys; from qwhisper.checkpoint import facts, reading; print(*sorted(sys.modules))"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "numpy", "transformers"} & set(modules)
    ground = {"auto_classes", "checkpoint", "disk", "errors", "files", "locks", "typed_json"}
    assert {name.split(".")[1] for name in modules if name.startswith("qwhisper.")} <= ground
