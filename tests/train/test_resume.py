"""A resumed run ends where the uninterrupted one does, to the last bit."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
from transformers import TrainerCallback

from qwhisper.checkpoint.folders import checkpoints
from qwhisper.engine.executor import Executor
from qwhisper.errors import CheckpointError, DiskError, QwhisperError, UsageError
from qwhisper.guards import state as ladder
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.run import main
from tests.small import write_dialogues, write_small_bases
from tests.test_faults.inject import plant
from tests.test_faults.kill_shim import fail
from tests.train.helpers import checkpoint_tensors, read_lines, same_bits
from tests.trained import small_arguments


class StopAfter(TrainerCallback):
    """Asks the loop to stop after `step`, as a user's own callback may."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        return control


def outcome(folder: Path, step: int):
    state = json.loads((folder / f"checkpoint-{step}/state.json").read_text())
    del state["probe"]  # seconds
    return checkpoint_tensors(folder / f"checkpoint-{step}"), state


WITH_DROPOUT = {
    "lora_dropout": 0.2,
    "projector_dropout": 0.2,
    "max_steps": 6,
    "save_steps": 100,
    "early_lr_steps": 4,
    "activation_clamp": "0.5",
    "logging_steps": 4,  # so that a stop comes between two counts of what was clamped
}


@pytest.fixture(scope="module")
def whole(bases, train_file, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run, which reads its data in its own process."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(small_arguments(bases, train_file=str(train_file), output_dir=str(folder), **WITH_DROPOUT)) == 0
    return folder


def test_a_base_in_fp8_learns_and_resumes_bit_exactly(arguments, tmp_path):
    whole = arguments(load_in_fp8=True, output_dir=str(tmp_path / "whole"))
    assert main(whole) == 0
    parts = arguments(load_in_fp8=True)
    assert main(parts, [StopAfter(3)]) == 0
    assert main(dataclasses.replace(parts, resume_from_checkpoint="latest")) == 0
    (tensors, state), (other_tensors, other_state) = (outcome(Path(run.output_dir), 6) for run in (whole, parts))
    assert same_bits(tensors, other_tensors) == [] and state == other_state
    losses = [line["loss"] for line in read_lines(tmp_path / "whole/metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]


# An epoch has 3 steps: after, at and before its edge.
@pytest.mark.parametrize(
    ("workers", "stop"),
    [(2, 3), *(pytest.param(*slow, marks=pytest.mark.slow) for slow in ((0, 3), (2, 1), (2, 5)))],
)
def test_resume_is_bit_exact(arguments, whole, workers, stop):
    parts = arguments(dataloader_num_workers=workers, **WITH_DROPOUT)
    folder = Path(parts.output_dir)
    assert main(parts, [StopAfter(stop)]) == 0
    assert not (folder / "checkpoint-6").exists()
    assert main(dataclasses.replace(parts, resume_from_checkpoint="latest")) == 0
    (tensors, state), (other_tensors, other_state) = outcome(whole, 6), outcome(folder, 6)
    assert same_bits(tensors, other_tensors) == [] and state == other_state
    clamped = [sum(sum(event["values"].values()) for event in read_lines(run / "events.jsonl")
                   if event["kind"] == "activations_clamped") for run in (whole, folder)]  # fmt: skip
    assert clamped == [state["guards"]["clamp"]["clamped"]] * 2 and clamped[0] > 0
    rates = [
        [(line["step"], line["learning_rate_lora"], line["loss"]) for line in read_lines(run / "metrics.jsonl")]
        for run in (whole, folder)
    ]
    assert rates[0] == rates[1]


class BadSteps(TrainerCallback):
    """Makes every loss of some steps NaN."""

    def __init__(self, steps: set[int], monkeypatch):
        self.steps, self.now = steps, 0
        plant(monkeypatch, lambda executor, loss: loss * math.nan if self.now in self.steps else None)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step


@pytest.mark.slow
def test_a_resumed_run_rewinds_to_what_the_uninterrupted_one_does(arguments, tmp_path, monkeypatch):
    values = {"max_steps": 8, "save_steps": 3, "max_bad_steps": 2, "freeze_projector_steps": 0, "early_lr_steps": 0}
    whole = arguments(output_dir=str(tmp_path / "whole"), **values)
    bad = BadSteps({4, 5}, monkeypatch)
    assert main(whole, [bad]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoint-8")
    shutil.rmtree(tmp_path / "parts/checkpoint-6")
    parts = dataclasses.replace(whole, output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest")
    assert main(parts, [bad]) == 0
    (tensors, state), (other_tensors, other_state) = outcome(tmp_path / "whole", 8), outcome(tmp_path / "parts", 8)
    assert same_bits(tensors, other_tensors) == [] and state == other_state and state["guards"]["rewinds"] == 1


MANY_REWINDS = {"max_steps": 9, "save_steps": 100, "max_bad_steps": 2, "freeze_projector_steps": 0, "early_lr_steps": 0}
MANY_REWINDS |= {"activation_clamp": "0.5", "logging_steps": 4, "per_device_train_batch_size": 1}


def with_many_rewinds(monkeypatch) -> BadSteps:
    monkeypatch.setattr(ladder, "SNAPSHOT_STEPS", 2)
    return BadSteps({4, 5, 6, 7}, monkeypatch)


@pytest.fixture(scope="module")
def rewound(bases, train_file, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run that rewinds twice."""
    folder = tmp_path_factory.mktemp("rewound")
    args = small_arguments(bases, train_file=str(train_file), output_dir=str(folder), **MANY_REWINDS)
    with pytest.MonkeyPatch.context() as patch:
        assert main(args, [with_many_rewinds(patch)]) == 0
    return folder


# In a row of bad steps, before it, and after a rewind.
@pytest.mark.parametrize("stop", [5, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (3, 6))])
def test_a_run_that_was_stopped_anywhere_rewinds_as_often_and_as_far(arguments, rewound, monkeypatch, stop):
    bad, parts = with_many_rewinds(monkeypatch), arguments(**MANY_REWINDS)
    folder = Path(parts.output_dir)
    assert main(parts, [bad, StopAfter(stop)]) == 0
    assert main(dataclasses.replace(parts, resume_from_checkpoint="latest"), [bad]) == 0
    (tensors, state), (other_tensors, other_state) = outcome(rewound, 9), outcome(folder, 9)
    assert same_bits(tensors, other_tensors) == [] and state == other_state
    rewinds = [[e["to_step"] for e in read_lines(run / "events.jsonl") if e["kind"] == "rewind"]
               for run in (rewound, folder)]  # fmt: skip
    assert rewinds == [[4, 2], [4, 2]]


def test_an_evaluation_that_a_signal_ended_is_made_up_with_its_snapshot(arguments, tmp_path, monkeypatch):
    held_out = write_dialogues(tmp_path / "held", 2, name="eval.jsonl")
    values = {"eval_file": str(held_out), "eval_steps": 4, "max_steps": 7, "save_steps": 100, "max_bad_steps": 2}
    values |= {"freeze_projector_steps": 0, "early_lr_steps": 0, "per_device_train_batch_size": 1}
    bad = BadSteps({4, 5}, monkeypatch)
    assert main(arguments(output_dir=str(tmp_path / "whole"), **values), [bad]) == 0
    parts = arguments(output_dir=str(tmp_path / "parts"), **values)
    honest, steps = Executor.evaluate, iter([0, 4])
    with monkeypatch.context() as patch:

        def evaluate(*given):
            if next(steps):
                os.kill(os.getpid(), signal.SIGTERM)
            return honest(*given)

        patch.setattr(Executor, "evaluate", evaluate)
        assert main(parts, [bad]) == 128 + signal.SIGTERM
    assert main(dataclasses.replace(parts, resume_from_checkpoint="latest"), [bad]) == 0
    (tensors, state), (other_tensors, other_state) = outcome(tmp_path / "whole", 7), outcome(tmp_path / "parts", 7)
    assert same_bits(tensors, other_tensors) == [] and state == other_state and state["guards"]["rewinds"] == 1


@pytest.fixture(scope="module")
def run_of_six(bases, train_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("six")
    assert main(small_arguments(bases, train_file=str(train_file), output_dir=str(folder))) == 0
    return folder


@pytest.fixture
def finished(arguments, run_of_six) -> TrainArguments:
    """Of a finished run with checkpoints of steps 3 and 6, in the test's own folder."""
    args = arguments()
    shutil.copytree(run_of_six, args.output_dir)
    return args


def test_projector_scale_is_changed_on_resume(finished):
    main(dataclasses.replace(finished, resume_from_checkpoint="latest", max_steps=7, projector_scale=0.7))
    configs = [Path(finished.output_dir) / f"checkpoint-{step}/config.json" for step in (6, 7)]
    assert [json.loads(path.read_text())["projector_scale"] for path in configs] == [1.0, 0.7]


def test_damaged_newest_checkpoint_is_named_and_the_older_one_taken(finished, capsys):
    damaged = Path(finished.output_dir) / "checkpoint-6/projector.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    main(dataclasses.replace(finished, resume_from_checkpoint="latest", max_steps=4))
    said = capsys.readouterr()
    assert "checkpoint-6: projector.safetensors is not what was written" in said.err
    assert "resuming from" in said.out and "checkpoint-3" in said.out


def test_another_base_is_refused(finished, tmp_path):
    _, other = write_small_bases(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="was trained on"):
        main(dataclasses.replace(finished, text_model=str(other), resume_from_checkpoint="latest"))


def test_folder_of_another_run_is_refused_with_the_command_that_resumes_it(finished):
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(finished.output_dir).rglob("*"))
    with pytest.raises(UsageError) as caught:
        main(finished)
    assert f"qwhisper train --config {finished.output_dir}/config.yaml --resume_from_checkpoint" in str(caught.value)
    assert sorted((p, p.stat().st_mtime_ns) for p in Path(finished.output_dir).rglob("*")) == before


def everything(folder) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


def test_a_refused_resume_changes_nothing(finished, tmp_path):
    before = everything(finished.output_dir)
    earlier = str(Path(finished.output_dir) / "checkpoint-3")
    for values in ({"lora_r": 3}, {"train_file": str(tmp_path / "gone.jsonl")}):
        with pytest.raises(QwhisperError):
            main(dataclasses.replace(finished, resume_from_checkpoint=earlier, **values))
        assert everything(finished.output_dir) == before


def test_another_runs_folder_is_refused_and_a_copy_of_its_own_checkpoint_is_not(finished, arguments, tmp_path):
    other = arguments(output_dir=str(tmp_path / "other"), max_steps=1)
    main(other)
    before = everything(finished.output_dir)
    foreign = str(tmp_path / "other/checkpoint-1")
    with pytest.raises(UsageError, match="holds another run"):
        main(dataclasses.replace(finished, resume_from_checkpoint=foreign))
    assert everything(finished.output_dir) == before
    shutil.copytree(Path(finished.output_dir) / "checkpoint-3", tmp_path / "backup/checkpoint-3")
    copy = str(tmp_path / "backup/checkpoint-3")
    again = dataclasses.replace(finished, resume_from_checkpoint=copy, max_steps=4, save_total_limit=1)
    assert main(again) == 0
    assert [p.name for p in checkpoints(Path(finished.output_dir))] == ["checkpoint-4"]
    new = dataclasses.replace(finished, output_dir=str(tmp_path / "new"), max_steps=2)
    assert main(dataclasses.replace(new, resume_from_checkpoint=foreign)) == 0


@pytest.mark.parametrize("place", ["run", "run/checkpoint-33"])
def test_a_path_that_is_no_checkpoint_is_a_mistake_in_the_command(finished, tmp_path, place):
    with pytest.raises(UsageError, match="no checkpoint-N folder"):
        main(dataclasses.replace(finished, resume_from_checkpoint=str(tmp_path / place)))


def test_a_full_disk_refuses_a_new_run_and_leaves_a_resumed_ones_config(finished, monkeypatch, capsys):
    config = (Path(finished.output_dir) / "config.yaml").read_text()
    monkeypatch.setattr("qwhisper.disk.write_whole", lambda path, text: fail(errno.ENOSPC)())
    assert main(dataclasses.replace(finished, resume_from_checkpoint="latest", max_steps=7)) == 0
    assert (Path(finished.output_dir) / "config.yaml").read_text() == config
    assert "is unchanged" in capsys.readouterr().out
    with pytest.raises(DiskError, match="make room"):
        main(dataclasses.replace(finished, output_dir=f"{finished.output_dir}-new"))


def test_all_checkpoints_damaged_is_an_error_of_its_own(finished):
    for folder in checkpoints(Path(finished.output_dir)):
        (folder / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole") as caught:
        main(dataclasses.replace(finished, resume_from_checkpoint="latest"))
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_ends_with_its_code(arguments, number):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    args = arguments(max_steps=6, save_steps=100)
    before = signal.getsignal(number)  # a shell in the background leaves SIGINT ignored
    assert main(args, [Kill()]) == 128 + number
    assert (Path(args.output_dir) / "checkpoint-2/manifest.json").exists()
    assert signal.getsignal(number) == before


def test_second_stage_starts_from_the_first_ones_weights(arguments, tmp_path):
    first = arguments(use_lora=False, output_dir=str(tmp_path / "align"), max_steps=1, freeze_projector_steps=0)
    assert main(first) == 0
    second = arguments(
        init_from=str(tmp_path / "align"), audio_model=None, text_model=None,
        output_dir=str(tmp_path / "lora"), max_steps=1, freeze_projector_steps=1,
    )  # fmt: skip
    assert main(second) == 0
    before, after = (checkpoint_tensors(tmp_path / f) for f in ("align/checkpoint-1", "lora/checkpoint-1"))
    projector = {k: v for k, v in before.items() if k.startswith("projector")}
    assert projector and same_bits(projector, {k: v for k, v in after.items() if k in projector}) == []
    assert any(k.startswith("adapter") for k in after) and not any(k.startswith("adapter") for k in before)
