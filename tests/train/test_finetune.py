"""`qwhisper.finetune`: a training from Python is the one from the command line, to the last bit."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

import qwhisper
from qwhisper.cli import main as cli
from qwhisper.errors import DataError, DiskError, NumericalError, UsageError
from qwhisper.train import finetune as module
from qwhisper.train.run import main
from tests.small import tone
from tests.test_faults.inject import plant
from tests.train.helpers import checkpoint_tensors, read_lines, same_bits
from tests.train.test_resume import StopAfter
from tests.trained import small_arguments


def flags(bases, **values):
    """Those of `small_arguments` by name, without the data."""
    args = small_arguments(bases, train_file="", output_dir="")
    names = ("audio_model", "text_model", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
             "freeze_projector_steps", "early_lr_steps", "audio_lead_silence", "audio_tail_silence", "seed",
             "logging_steps")  # fmt: skip
    return {name: getattr(args, name) for name in names} | {"max_steps": 4, "save_steps": 100} | values


def as_array(file: Path) -> dict:
    samples, rate = soundfile.read(file, dtype="float32")
    return {"array": samples, "sampling_rate": rate}


def as_integers(file: Path) -> dict:
    samples, rate = soundfile.read(file, dtype="int16")
    return {"array": samples, "sampling_rate": rate}


SOURCES = (as_array, as_integers, lambda file: file.read_bytes(), str, lambda file: file)


@pytest.fixture(scope="module")
def dialogues(train_file) -> list[dict]:
    """Those of `train_file`, with their clips in every form that Python has for them."""
    records = read_lines(train_file)
    for number, record in enumerate(records):
        for message in record["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part["type"] == "audio":
                    part["audio"] = SOURCES[number % len(SOURCES)](train_file.parent / part["audio"])
    return records


@pytest.fixture(scope="module")
def from_file(bases, train_file, tmp_path_factory) -> Path:
    """The folder of a run on `train_file`, without a stop."""
    folder = tmp_path_factory.mktemp("from-file")
    values = {"train_file": str(train_file), "output_dir": str(folder)}
    assert main(small_arguments(bases, **values | {"max_steps": 4, "save_steps": 100})) == 0
    return folder


def test_dialogues_in_memory_train_as_their_file_does_and_so_does_what_goes_on_from_them(
    bases, dialogues, from_file, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    first = qwhisper.finetune(iter(dialogues), folder, callbacks=[StopAfter(1)], **flags(bases))
    assert (first.steps, first.checkpoint) == (1, folder / "checkpoint-1")
    resumed = flags(bases, resume_from_checkpoint=True)
    assert qwhisper.finetune(dialogues, folder, callbacks=[StopAfter(2)], **resumed).steps == 2
    monkeypatch.chdir("/")
    assert cli(["train", "--config", str(folder / "config.yaml"), "--resume_from_checkpoint"]) == 0
    tensors = checkpoint_tensors(folder / "checkpoint-4")
    assert same_bits(tensors, checkpoint_tensors(from_file / "checkpoint-4")) == [] and tensors
    assert len(list((folder / "data").glob("*.jsonl"))) == 1  # one and the same each time


def test_what_was_given_is_left_to_itself_and_arrays_are_written_beside_the_dialogues(bases, dialogues, tmp_path):
    before = json.dumps(dialogues, default=repr)
    qwhisper.finetune(dialogues, tmp_path / "run", **flags(bases, max_steps=1))
    assert json.dumps(dialogues, default=repr) == before
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert Path(config["train_file"]).parent == tmp_path / "run/data"
    assert config["data_root"] == str(Path(dialogues[3]["messages"][0]["content"][0]["audio"]).parent)
    places = [
        part["audio"]
        for record in read_lines(Path(config["train_file"]))
        for message in record["messages"]
        for part in (message["content"] if isinstance(message["content"], list) else ())
        if part["type"] == "audio"
    ]
    assert {place.startswith("audio/") for place in places} == {True, False}
    assert all((tmp_path / "run/data" / place).is_file() for place in places)


def test_the_result_says_what_was_made(bases, train_file, dialogues, tmp_path):
    result = qwhisper.finetune(str(train_file), tmp_path / "run", eval_dialogues=dialogues[:3], **flags(bases))
    state = json.loads((tmp_path / "run/checkpoint-4/state.json").read_text())
    assert result.checkpoint == tmp_path / "run" / state["best_checkpoint"]
    assert (result.steps, result.skipped_steps) == (4, 0)
    assert result.supervised_tokens == state["supervised_tokens"] > 0
    assert result.held_out_loss == state["learning"]["last_held_out"] > 0 and result.loss > 0
    assert qwhisper.Qwen3AudioForConditionalGeneration.from_pretrained(result.checkpoint).config.projector_stack == 4


def question(**audio) -> dict:
    return {
        "messages": [{"role": "user", "content": [{"type": "audio", **audio}]}, {"role": "assistant", "content": "a"}]
    }


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([question(array=tone(200, 0.1)), {"messages": []}], "train:2: the dialogue is empty"),
        ([question(audio="nowhere.wav")], "train:1: message 1, part 1: audio file 'nowhere.wav' does not exist"),
        ([question(array=np.zeros((3, 3)))], "train:1: message 1, part 1: `array` has the shape"),
        (["data.jsonl"], "train:1: a dialogue must be a dict with `messages`, not str"),
        ([{"id": "a"} | question(array=[0.1, 0.2])] * 2, "train:2: id 'a' was used before, at train:1"),
        ([{"id": "\ud800"} | question(array=[0.1, 0.2])], "train:1: half of a surrogate pair"),
        ([], "train: no dialogue in it"),
    ],
)
def test_faulty_dialogues_are_refused_before_anything_is_made(tmp_path, records, message):
    with pytest.raises(DataError) as refused:
        qwhisper.finetune(records, tmp_path / "run")
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dialogues": None}, "the train dialogues are None; give the path of a JSONL file"),
        ({"dialogues": 3}, "the train dialogues are int; give"),
        ({"dialogues": question(audio="a.wav")}, "the train dialogues are dict; give"),
        ({"dialogues": [question(array=[0.1])], "eval_dialogues": 0}, "the eval dialogues are int; give"),
    ],
)
def test_what_holds_no_dialogues_is_refused(tmp_path, given, message):
    with pytest.raises(UsageError) as refused:
        qwhisper.finetune(output_dir=tmp_path / "run", **given)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rat": 1}, "unknown flag --learning_rat; did you mean --learning_rate?"),
        ({"warmup_ratio": 0.1}, "--warmup_ratio is no longer a flag"),
        ({"train_file": "a"}, "--train_file has a parameter here: give it as dialogues"),
        ({"lora_r": 0}, "--lora_r 0: must be 1 or more"),
        ({"lora_r": "8"}, "--lora_r"),
    ],
)
def test_flags_are_checked_as_on_the_command_line(tmp_path, wrong, message):
    with pytest.raises(UsageError) as refused:
        qwhisper.finetune([question(array=tone(200, 0.1))], tmp_path / "run", **wrong)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused_and_not_changed(finished_run):
    before = sorted(finished_run.rglob("*"))
    with pytest.raises(UsageError, match="holds another run"):
        qwhisper.finetune([question(array=tone(200, 0.1))], finished_run)
    assert sorted(finished_run.rglob("*")) == before


def test_files_outside_of_a_data_root_are_refused(tmp_path, train_file, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(DataError, match="lies outside"):
        qwhisper.finetune([question(audio=train_file.parent / "clip0.wav")], "run", data_root=tmp_path / "empty")


def test_a_training_that_fails_raises_its_error(bases, train_file, tmp_path, monkeypatch):
    plant(monkeypatch, lambda executor, loss: loss * float("nan"))
    with pytest.raises(NumericalError):
        qwhisper.finetune(train_file, tmp_path / "run", **flags(bases, max_steps=2))


def test_a_full_disk_is_an_error_of_ours(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/data").touch()  # where a folder must be made
    with pytest.raises(DiskError, match="run/data: can't be written"):
        qwhisper.finetune([question(array=tone(200, 0.1))], tmp_path / "run")


@pytest.mark.parametrize(("received", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_caller_as_python_would(tmp_path, train_file, monkeypatch, received, error):
    monkeypatch.setattr(module, "main", lambda *arguments: 128 + received)
    with pytest.raises(error):
        qwhisper.finetune(train_file, tmp_path / "run")
