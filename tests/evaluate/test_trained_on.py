"""What of the evaluation data a checkpoint was trained on."""

import json
import shutil

from qwhisper.data.dialogue import read_dialogues
from qwhisper.evaluate.trained_on import shared_with_training
from tests.small import write_dialogues


def test_evaluation_data_that_was_trained_on_is_noted(finished_run, tmp_path):
    folder, train_file = finished_run / "checkpoint-2", finished_run.parent / "data/train.jsonl"
    copy = shutil.copy(train_file, tmp_path / "copy.jsonl")
    (note,) = shared_with_training(folder, copy, read_dialogues(train_file))
    assert note == f"{copy} is what checkpoint-2 was trained on: its scores say what was learned by heart."
    other = tmp_path / "other.jsonl"
    other.write_text('{"messages": [{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "Hey"}]}\n')
    assert shared_with_training(folder, other, read_dialogues(other)) == []


def test_training_data_that_moved_with_its_run_is_compared(finished_run, tmp_path):
    run = tmp_path / finished_run.name
    shutil.copytree(finished_run / "checkpoint-2", run / "checkpoint-2")
    shutil.copytree(finished_run.parent / "data", tmp_path / "data")
    told = json.loads((finished_run / "checkpoint-2/arguments.json").read_text())
    was = {"output_dir": "/nowhere/run", "train_file": "/nowhere/data/train.jsonl"}
    assert told["train_file"].endswith("data/train.jsonl")
    (run / "checkpoint-2/arguments.json").write_text(json.dumps(told | was))
    other = tmp_path / "other.jsonl"
    first, *_ = (tmp_path / "data/train.jsonl").read_text().splitlines(keepends=True)
    other.write_text(first.replace('"clip', '"data/clip'))
    (note,) = shared_with_training(run / "checkpoint-2", other, read_dialogues(other))
    assert note.startswith("1 of 1 held-out dialogues are in the training data as they are")


def test_training_data_that_is_gone_is_said_not_to_be_compared(finished_run, tmp_path):
    folder = shutil.copytree(finished_run / "checkpoint-2", tmp_path / "checkpoint-2")
    told = json.loads((folder / "arguments.json").read_text()) | {"train_file": str(tmp_path / "gone.jsonl")}
    (folder / "arguments.json").write_text(json.dumps(told))
    eval_file = write_dialogues(tmp_path / "data", 1)
    (note,) = shared_with_training(folder, eval_file, read_dialogues(eval_file))
    assert note.startswith(f"Whether {eval_file} shares dialogues with the training data was not checked: ")
    assert "gone.jsonl does not exist" in note
