"""A run, its checkpoints and its bases work from any current folder, and after they were moved."""

import contextlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from qwhisper import Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor
from qwhisper.checkpoint.folders import write_checkpoint
from qwhisper.cli import main as cli
from qwhisper.commands import VERBS
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.infer.assistant import Assistant
from qwhisper.parsing import parse
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.run import main as train
from qwhisper.train.verification import verify
from tests.small import write_dialogues, write_small_bases

TRAIN = [
    *("train", "--train_file", "data/train.jsonl", "--output_dir", "run", "--save_steps", "1", "--max_steps", "2"),
    *("--audio_model", "bases/whisper", "--text_model", "bases/qwen3", "--learning_rate", "1e-2"),
    *("--early_lr_steps", "0", "--freeze_projector_steps", "0", "--audio_tail_silence", "0.1"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of bases, data and run, where it was trained with relative paths): it was moved since."""
    folder = tmp_path_factory.mktemp("tree")
    first = folder / "first"
    write_small_bases(first / "bases")
    write_dialogues(first / "data")
    with contextlib.chdir(first):
        assert cli(TRAIN) == 0
    first.rename(folder / "kept")
    return folder / "kept", first


@pytest.fixture
def moved(trained, tmp_path, monkeypatch):
    """A copy of the test's own, seen from a third folder."""
    folder = shutil.copytree(trained[0], tmp_path / "else where" / "moved")
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    return folder


def assert_is(model, checkpoint: Path) -> None:
    projector = load_file(checkpoint / "projector.safetensors")
    for name, tensor in model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(tensor.cpu(), projector[name]), name


def config_of(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text())


def test_what_is_stored_are_absolute_paths(trained):
    now, then = trained
    config = config_of(now / "run")
    told = json.loads((now / "run/checkpoint-2/arguments.json").read_text())
    for values in (config, told):
        assert values["output_dir"] == str(then / "run")
        assert values["train_file"] == str(then / "data/train.jsonl")
        assert values["audio_model"] == str(then / "bases/whisper")
    saved = json.loads((now / "run/checkpoint-2/config.json").read_text())
    assert saved["text_base"]["name"] == str(then / "bases/qwen3")
    adapter = json.loads((now / "run/checkpoint-2/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(then / "bases/qwen3")


def test_a_hub_id_is_stored_as_it_is(tmp_path, monkeypatch):
    from qwhisper.checkpoint.places import absolute

    monkeypatch.chdir(tmp_path)
    values = {"output_dir": "run", "text_model": "Qwen/Qwen3-8B", "eval_file": None, "resume_from_checkpoint": "latest"}
    assert absolute(values) == values | {"output_dir": str(tmp_path / "run")}


def test_a_moved_tree_is_resumed_from_a_third_folder(moved, tmp_path, capsys):
    code = cli(["train", "--config", "../else where/moved/run/config.yaml", "--resume_from_checkpoint",
                "--max_steps", "3"])  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0
    assert f"resuming from {moved}/run/checkpoint-2" in said
    assert list((tmp_path / "third").iterdir()) == []
    config = config_of(moved / "run")
    assert (config["output_dir"], config["max_steps"]) == (str(moved / "run"), 3)
    assert config["train_file"] == str(moved / "data/train.jsonl")
    saved = json.loads((moved / "run/checkpoint-3/config.json").read_text())
    assert saved["audio_base"]["name"] == str(moved / "bases/whisper")
    adapter = json.loads((moved / "run/checkpoint-3/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(moved / "bases/qwen3")
    # The data is where the run is now, so the losses of before still count.
    assert "checkpoint-2 continues with --max_steps 3 (was 2)" in said
    assert json.loads((moved / "run/checkpoint-3/state.json").read_text())["learning"]["steps"] == 3


def test_a_moved_run_is_the_same_run_for_a_checkpoint_that_is_given(moved, tmp_path):
    config = ["train", "--config", str(moved / "run/config.yaml"), "--max_steps", "3", "--resume_from_checkpoint"]
    backup = shutil.copytree(moved / "run/checkpoint-1", tmp_path / "backup/checkpoint-1")
    assert cli([*config, str(moved / "run/checkpoint-2")]) == 0
    assert cli([*config, str(backup)]) == 0
    assert (moved / "run/aside-checkpoint-3").is_dir()


def test_a_run_is_resumed_through_a_link(moved, tmp_path):
    (tmp_path / "link").symlink_to(moved / "run")
    assert cli(["train", "--config", "../link/config.yaml", "--resume_from_checkpoint", "--max_steps", "3"]) == 0
    assert (moved / "run/checkpoint-3").is_dir()


def test_a_run_of_before_whose_paths_are_relative_is_resumed_from_a_third_folder(moved):
    run = moved / "run"
    then = config_of(run)
    relative = {"output_dir": "run", "train_file": "data/train.jsonl"}
    relative |= {"audio_model": "bases/whisper", "text_model": "bases/qwen3"}
    (run / "config.yaml").write_text(yaml.safe_dump(then | relative))

    def as_before(folder: Path) -> None:
        shutil.copytree(run / "checkpoint-2", folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        told = json.loads((folder / "arguments.json").read_text()) | relative
        (folder / "arguments.json").write_text(json.dumps(told))
        config = json.loads((folder / "config.json").read_text())
        for role in ("audio", "text"):
            config[f"{role}_base"]["name"] = relative[f"{role}_model"]
        (folder / "config.json").write_text(json.dumps(config))

    write_checkpoint(run, 2, as_before)
    command = ["train", "--config", str(run / "config.yaml"), "--resume_from_checkpoint", "--max_steps", "3"]
    assert cli([*command, "--train_file", str(moved / "data/train.jsonl")]) == 0
    assert (run / "checkpoint-3").is_dir()
    assert Path(config_of(run)["output_dir"]) == run


def test_every_reader_finds_the_bases_of_a_moved_tree(moved, monkeypatch):
    newest = moved / "run/checkpoint-2"
    assistant = Assistant.from_pretrained("../else where/moved/run")
    assert_is(assistant.model, newest)
    assert assistant.model.config.text_base["name"] == str(moved / "bases/qwen3")
    proof = verify("../else where/moved/run")
    assert proof.folder == newest
    assert proof.dialogue == f"{moved / 'data/train.jsonl'}:1"
    assert_is(
        AutoModelForMultimodalLM.from_pretrained("../else where/moved/run/checkpoint-1"),
        newest.with_name("checkpoint-1"),
    )
    processor = Qwen3AudioProcessor.from_pretrained(moved / "run")
    assert processor.chat_template == assistant.encoder.chat_template


@pytest.mark.parametrize("place", ["with/run", "with"])  # beside the checkpoint, beside the run
def test_bases_are_found_beside_the_checkpoint_by_the_name_of_their_folder(moved, tmp_path, place):
    run = shutil.copytree(moved / "run", tmp_path / "with/run")
    for name in ("whisper", "qwen3"):
        shutil.copytree(moved / "bases" / name, tmp_path / place / name)
    shutil.rmtree(moved)
    model = Qwen3AudioForConditionalGeneration.from_pretrained(run)
    assert_is(model, run / "checkpoint-2")
    assert model.config.audio_base["name"] == str(tmp_path / place / "whisper")


def test_another_model_of_that_name_is_not_taken(moved, capsys):
    _, other = write_small_bases(moved / "other", seed=1)
    shutil.rmtree(moved / "bases/qwen3")
    other.rename(moved / "bases/qwen3")
    with pytest.raises(UsageError, match="its text base was not found"):
        Assistant.from_pretrained(moved / "run")


def test_a_renamed_base_is_named_with_the_places_and_taken_from_the_flag(moved, trained, capsys):
    (moved / "bases/qwen3").rename(moved / "bases/renamed")
    clip, run = str(moved / "data/clip0.wav"), str(moved / "run")
    eval_file = str(write_dialogues(moved / "few", 1))
    commands = [
        ["chat", run, "--audio", clip, "--max_new_tokens", "1"],
        ["eval", run, "--eval_file", eval_file, "--max_new_tokens", "1", "--no_swap_audio", "--no_ask_text_model"],
        ["verify", run],
        ["train", "--config", f"{run}/config.yaml", "--resume_from_checkpoint", "--max_steps", "3"],
    ]
    for command in commands:
        assert cli(command) == (6 if command[0] == "verify" else 2)
        said = capsys.readouterr().err
        assert "--text_model" in said and str(trained[1] / "bases/qwen3") in said and str(moved) in said, command
        assert cli([*command, "--text_model", str(moved / "bases/whisper")]) == 2, command
        assert cli([*command, "--text_model", "../else where/moved/bases/renamed"]) == 0, command


def test_a_base_that_changed_where_it_lies_is_no_moved_one(moved, tmp_path):
    run = shutil.copytree(moved / "run", tmp_path / "again/run")
    shutil.rmtree(run / "checkpoint-1")
    arguments = json.loads((run / "checkpoint-2/arguments.json").read_text())
    told = arguments | {"output_dir": str(tmp_path / "here"), "init_from": str(run), "max_steps": 1}
    told |= {"audio_model": str(moved / "bases/whisper"), "text_model": str(moved / "bases/qwen3")}
    assert train(TrainArguments(**told | {"train_file": str(moved / "data/train.jsonl")})) == 0
    _, other = write_small_bases(tmp_path / "other", seed=1)
    shutil.rmtree(moved / "bases/qwen3")
    other.rename(moved / "bases/qwen3")
    with pytest.raises(CheckpointError, match=r"was trained on another text base than .*qwen3 is now: .*--text_model"):
        Assistant.from_pretrained(tmp_path / "here")


def test_a_second_stage_starts_from_a_moved_run_and_names_the_bases_that_it_found(moved, tmp_path):
    command = ["train", "--init_from", "../else where/moved/run", "--output_dir", "second", "--max_steps", "1"]
    assert cli([*command, "--train_file", str(moved / "data/train.jsonl")]) == 0
    saved = json.loads((tmp_path / "third/second/checkpoint-1/config.json").read_text())
    assert saved["text_base"]["name"] == str(moved / "bases/qwen3")
    assert config_of(tmp_path / "third/second")["init_from"] == str(moved / "run")


def test_data_that_is_gone_is_named_with_the_flag(moved, capsys):
    (moved / "data").rename(moved / "gone")
    command = ["train", "--config", str(moved / "run/config.yaml"), "--resume_from_checkpoint", "--max_steps", "3"]
    assert cli(command) == 3
    assert (
        "data/train.jsonl does not exist: if it has moved, give its path with --train_file" in capsys.readouterr().err
    )
    assert cli([*command, "--train_file", str(moved / "gone/train.jsonl")]) == 0


def test_a_resume_that_finds_no_run_stops_and_makes_no_folder(moved, tmp_path, capsys):
    command = [*TRAIN, "--resume_from_checkpoint"]
    assert cli(command) == 2
    assert f"no checkpoint in {tmp_path}/third/run (--output_dir), and no such folder" in capsys.readouterr().err
    assert list((tmp_path / "third").iterdir()) == []
    (tmp_path / "third/run").mkdir()
    assert cli(command) == 2
    assert "start a new run without --resume_from_checkpoint" in capsys.readouterr().err
    assert list((tmp_path / "third/run").iterdir()) == []


def test_a_run_that_ended_before_its_first_checkpoint_is_started_anew_by_the_command_that_is_named(moved, capsys):
    for step in (1, 2):
        shutil.rmtree(moved / f"run/checkpoint-{step}")
    command = ["train", "--config", "../else where/moved/run/config.yaml"]
    assert cli([*command, "--resume_from_checkpoint"]) == 2
    said = capsys.readouterr().err
    assert "the run ended before its first save" in said
    named = shlex.split(said.split("To start it again: ")[1])
    assert named == ["qwhisper", "train", "--config", str(moved / "run/config.yaml")]
    assert cli([*named[1:], "--max_steps", "1"]) == 0
    assert (moved / "run/checkpoint-1").is_dir()
    assert cli(command) == 2
    resume = capsys.readouterr().err.split("To resume it: ")[1].split(". For a new run")[0]
    assert cli([*shlex.split(resume)[1:], "--max_steps", "2"]) == 0


def test_a_copy_of_a_run_is_a_run_where_it_lies_and_flags_win(trained, tmp_path, monkeypatch):
    """Also while the run that it was copied from is still there."""
    now, then = trained
    copy = shutil.copytree(now / "run", tmp_path / "copy")
    moved_config, elsewhere = copy / "config.yaml", tmp_path / "other/config.yaml"
    monkeypatch.chdir(tmp_path)
    elsewhere.parent.mkdir()
    for name, output_dir in (("copy/config.yaml", str(copy)), ("other/config.yaml", str(then / "run"))):
        if not Path(name).exists():
            shutil.copy(moved_config, elsewhere)
        assert parse("train", VERBS["train"], TrainArguments, ["--config", name]).output_dir == output_dir
        arguments = parse("train", VERBS["train"], TrainArguments, ["--config", name, "--output_dir", "new"])
        assert arguments.output_dir == "new"
    shutil.copy(moved_config, copy / "recipe.yaml")
    assert parse("train", VERBS["train"], TrainArguments, ["--config", "copy/recipe.yaml"]).output_dir == str(
        then / "run"
    )


def test_a_copied_config_is_the_recipe_of_a_new_run(moved, tmp_path, capsys):
    new = tmp_path / "third/new"
    new.mkdir()
    text = (moved / "run/config.yaml").read_text().replace(str(moved.parents[1]), "")
    config = config_of(moved / "run") | {
        "output_dir": str(tmp_path / "third/other"),
        "train_file": str(moved / "data/train.jsonl"),
        "audio_model": str(moved / "bases/whisper"),
        "text_model": str(moved / "bases/qwen3"),
        "max_steps": 1,
    }
    (new / "config.yaml").write_text(text.splitlines()[0] + "\n" + yaml.safe_dump(config))
    assert cli(["train", "--config", "new/config.yaml"]) == 0
    assert (tmp_path / "third/other/checkpoint-1").is_dir()
    assert cli(["train", "--config", "new/config.yaml", "--output_dir", "new"]) == 0
    assert (new / "checkpoint-1").is_dir()
    told = ["--config", "other/config.yaml", "--output_dir", "third"]
    assert parse("train", VERBS["train"], TrainArguments, told).output_dir == "third", "flags win over the file's place"


def test_a_users_own_config_in_the_folder_is_not_overwritten(moved, tmp_path, capsys):
    recipe = tmp_path / "third/run/config.yaml"
    recipe.parent.mkdir()
    recipe.write_text("# my notes\nlora_r: 4\noutput_dir: run\n")
    with contextlib.chdir(moved):
        assert cli([*TRAIN, "--config", str(recipe), "--output_dir", str(recipe.parent)]) == 2
        assert "holds a config.yaml that would be overwritten" in capsys.readouterr().err
        given = ["--resume_from_checkpoint", "run/checkpoint-1"]
        assert cli([*TRAIN, *given, "--config", str(recipe), "--output_dir", str(recipe.parent)]) == 2
    assert recipe.read_text().startswith("# my notes")
