"""A run is read while a trainer saves and deletes its checkpoints: what is read is one whole checkpoint, the newest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwhisper import Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor
from qwhisper.checkpoint import folders, manifest, reading
from qwhisper.checkpoint.folders import rotate, write_checkpoint
from qwhisper.checkpoint.reading import choose_checkpoint, newest_usable, read_checkpoint
from qwhisper.cli import main as cli
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.infer.assistant import Assistant
from qwhisper.model import loading
from qwhisper.train.verification import verify


def save(run: Path, step: int, best: str | None = None) -> Path:
    """As a trainer with --save_total_limit 1 does."""

    def fill(folder: Path) -> None:
        (folder / "weights.txt").write_text(str(step))
        (folder / "state.json").write_text(json.dumps({"best_checkpoint": best}))

    written = write_checkpoint(run, step, fill)
    rotate(run, 1, {written.name})
    return written


def weights(folder: Path) -> str:
    return (folder / "weights.txt").read_text()


def saving_before(read, run: Path, saves: int):
    """`read`, with a trainer that saves the next step, and deletes the one before, in front of its first calls."""
    calls = []

    def reading(folder: Path):
        calls.append(folder.name)
        if len(calls) <= saves:
            save(run, 1 + len(calls))
        return read(folder)

    return reading, calls


@pytest.mark.parametrize("saves", [0, 1, 4])
def test_a_checkpoint_that_is_deleted_while_it_is_read_is_followed_by_the_newest(tmp_path, saves):
    save(tmp_path, 1)
    read, calls = saving_before(weights, tmp_path, saves)
    assert read_checkpoint(tmp_path, read) == str(1 + saves)
    assert calls == [f"checkpoint-{1 + n}" for n in range(saves + 1)]


def test_what_was_read_before_a_deletion_is_not_taken_as_whole(tmp_path):
    save(tmp_path, 1)
    read, _ = saving_before(lambda folder: weights(folder) if folder.exists() else "half of it", tmp_path, 1)
    assert read_checkpoint(tmp_path, read) == "2"


def test_a_checkpoint_that_is_replaced_by_one_of_its_step_is_read_again(tmp_path):
    save(tmp_path, 1)
    seen = []

    def read(folder: Path) -> int:
        if not seen:
            save(tmp_path, 1)
        seen.append(folder)
        return len(seen)

    assert read_checkpoint(tmp_path, read) == 2


def test_a_trainer_that_is_always_faster_ends_the_reading_with_an_advice(tmp_path):
    save(tmp_path, 1)
    read, calls = saving_before(weights, tmp_path, 100)
    with pytest.raises(
        CheckpointError, match=r"each of 5 checkpoints was deleted while it was read: .*save_total_limit"
    ):
        read_checkpoint(tmp_path, read)
    assert len(calls) == 5


@pytest.mark.parametrize("when", ["hashing", "reading"])
def test_a_given_checkpoint_that_is_deleted_is_an_error_that_names_the_newest(tmp_path, monkeypatch, when):
    given = save(tmp_path, 1)
    if when == "hashing":
        honest = manifest.file_sha256
        left = [2]
        monkeypatch.setattr(
            manifest, "file_sha256", lambda path: (left and save(tmp_path, left.pop()) and None) or honest(path)
        )
    read, _ = saving_before(weights, tmp_path, 1)
    told = f"{given}: it was deleted while it was read; the newest of its run is checkpoint-2. .* {tmp_path}"
    with pytest.raises(CheckpointError, match=told):
        read_checkpoint(given, read)
    with pytest.raises(UsageError, match=f"no such folder; the newest checkpoint of {tmp_path} is checkpoint-2"):
        read_checkpoint(given, weights)


def test_an_error_that_is_no_deletions_fault_is_raised_at_once(tmp_path):
    save(tmp_path, 1)
    calls = []

    def read(folder: Path) -> None:
        calls.append(folder)
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        read_checkpoint(tmp_path, read)
    assert len(calls) == 1


def test_the_path_that_is_read_is_absolute(tmp_path, monkeypatch):
    save(tmp_path / "run", 1)
    monkeypatch.chdir(tmp_path)
    assert read_checkpoint("run", lambda folder: folder) == tmp_path / "run/checkpoint-1"


@pytest.mark.parametrize("find", [choose_checkpoint, lambda run: newest_usable(run)[0]])
@pytest.mark.parametrize("place", ["check_manifest", "file_sha256"])
def test_a_run_that_is_saved_while_it_is_looked_through_is_looked_through_again(tmp_path, monkeypatch, find, place):
    save(tmp_path, 1)
    honest = getattr(manifest, place)
    left = [4, 3, 2]

    def saving_meanwhile(path: Path):
        if left:
            save(tmp_path, left.pop())
        return honest(path)

    monkeypatch.setattr(manifest, place, saving_meanwhile)
    assert find(tmp_path).name == "checkpoint-4"


def test_the_best_one_may_go_as_well(tmp_path, monkeypatch):
    for step in (1, 2):
        write_checkpoint(
            tmp_path, step, lambda folder: (folder / "state.json").write_text('{"best_checkpoint": "checkpoint-1"}')
        )
    honest = reading.check_usable

    def check(folder: Path) -> None:
        if folder.name == "checkpoint-1" and folder.exists():
            save(tmp_path, 3, best="checkpoint-3")
        honest(folder)

    monkeypatch.setattr(reading, "check_usable", check)
    assert choose_checkpoint(tmp_path).name == "checkpoint-3"


def test_a_replacement_between_its_two_renames_is_waited_for(tmp_path, monkeypatch):
    """The only checkpoint has neither name in the lists of both, which are read one after the other."""
    save(tmp_path, 1)
    honest = folders.by_step
    calls = []

    def between(run: Path):
        calls.append(run)
        if len(calls) == 1:
            (run / "checkpoint-1").rename(run / ".checkpoint-1.old")
            return {}
        if len(calls) == 2:
            shutil.copytree(run / ".checkpoint-1.old", run / "checkpoint-1")
        return honest(run)

    monkeypatch.setattr(folders, "by_step", between)
    assert choose_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.fixture
def rotated_in_the_middle(finished_run, tmp_path, monkeypatch):
    """A run whose checkpoint-1 is deleted after its configuration was read and before its weights are."""
    run, later = tmp_path / "run", tmp_path / "checkpoint-2"
    shutil.copytree(finished_run / "checkpoint-1", run / "checkpoint-1")
    shutil.copytree(finished_run / "checkpoint-2", later)
    honest = loading.load_trained_weights

    def load(model, name):
        if later.exists():
            later.rename(run / "checkpoint-2")
            rotate(run, 1, set())
        return honest(model, name)

    monkeypatch.setattr(loading, "load_trained_weights", load)
    return run


@pytest.mark.parametrize(
    "load", [lambda run: Assistant.from_pretrained(run).model, Qwen3AudioForConditionalGeneration.from_pretrained]
)
def test_a_model_is_loaded_from_the_newest_where_the_one_before_goes_meanwhile(rotated_in_the_middle, load):
    model = load(rotated_in_the_middle)
    projector = load_file(rotated_in_the_middle / "checkpoint-2/projector.safetensors")
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight.cpu(), projector["linear_1.weight"])


def test_verify_goes_on_with_the_newest(rotated_in_the_middle):
    assert verify(rotated_in_the_middle).folder == rotated_in_the_middle / "checkpoint-2"


def test_eval_goes_on_with_the_newest(rotated_in_the_middle, finished_run):
    train_file = str(finished_run.parent / "data/train.jsonl")
    told = ["--max_samples", "1", "--max_new_tokens", "1", "--no_swap_audio", "--no_ask_text_model"]
    assert cli(["eval", str(rotated_in_the_middle), "--eval_file", train_file, *told]) == 0
    assert not (rotated_in_the_middle / "checkpoint-1").exists()


def test_a_second_stage_starts_from_the_newest(rotated_in_the_middle, finished_run, tmp_path):
    command = ["train", "--init_from", str(rotated_in_the_middle), "--output_dir", str(tmp_path / "second")]
    command += ["--train_file", str(finished_run.parent / "data/train.jsonl"), "--max_steps", "1"]
    assert cli([*command, "--learning_rate", "1e-9"]) == 0
    start, end = (
        load_file(folder / "projector.safetensors")
        for folder in (rotated_in_the_middle / "checkpoint-2", tmp_path / "second/checkpoint-1")
    )
    assert all(torch.allclose(start[name], end[name], rtol=0, atol=1e-8) for name in start)


def test_a_run_folder_gives_its_best_checkpoint_to_from_pretrained(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    model = Qwen3AudioForConditionalGeneration.from_pretrained(run)
    processor = Qwen3AudioProcessor.from_pretrained(str(run))
    projector = load_file(run / "checkpoint-2/projector.safetensors")
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight.cpu(), projector["linear_1.weight"])
    assert processor.frames == model.config.frames

    def best(folder: Path) -> None:
        shutil.copytree(run / "checkpoint-2", folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        state = json.loads((folder / "state.json").read_text()) | {"best_checkpoint": "checkpoint-1"}
        (folder / "state.json").write_text(json.dumps(state))

    write_checkpoint(run, 2, best)
    projector = load_file(run / "checkpoint-1/projector.safetensors")
    model = Qwen3AudioForConditionalGeneration.from_pretrained(run)
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight.cpu(), projector["linear_1.weight"])


def test_from_pretrained_checks_the_hashes_of_a_checkpoint(finished_run, tmp_path):
    folder = shutil.copytree(finished_run / "checkpoint-2", tmp_path / "checkpoint-2")
    content = bytearray((folder / "projector.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "projector.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"projector\.safetensors is not what was written"):
        Qwen3AudioForConditionalGeneration.from_pretrained(folder)


def test_a_folder_with_a_model_beside_its_checkpoints_is_that_model(finished_run, tmp_path):
    """As HF's Trainer leaves it."""
    folder = shutil.copytree(
        finished_run / "checkpoint-1", tmp_path / "out", ignore=shutil.ignore_patterns("manifest.json")
    )
    shutil.copytree(finished_run / "checkpoint-2", folder / "checkpoint-2")
    model = Qwen3AudioForConditionalGeneration.from_pretrained(folder)
    projector = load_file(folder / "projector.safetensors")
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight.cpu(), projector["linear_1.weight"])


def test_a_folder_that_another_library_wrote_says_what_to_give(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"a PEFT adapter alone; load its model"):
        choose_checkpoint(tmp_path / "adapter")
    for step in (9, 10):
        (tmp_path / "hf-run" / f"checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"give one of its checkpoints, such as .*checkpoint-10"):
        choose_checkpoint(tmp_path / "hf-run")
