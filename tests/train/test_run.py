"""How a training run ends: its exit code and its last line."""

import os
import signal
from pathlib import Path

import pytest
from transformers import TrainerCallback

from qwhisper.errors import DataError, NumericalError, QwhisperError
from qwhisper.train.run import main
from tests.small import write_dialogues
from tests.test_faults.inject import loss_times, plant
from tests.test_faults.lives import At
from tests.train.helpers import read_lines


def with_bad_clips(folder: Path, numbers) -> str:
    data = write_dialogues(folder, 12)
    for number in numbers:
        (folder / f"clip{number}.wav").write_bytes(b"no sound")
    return str(data)


def last_line(capsys) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def only_spoken(data: str) -> str:
    spoken = [line for line in Path(data).read_text().splitlines() if ".wav" in line]
    Path(data).write_text("\n".join(spoken) + "\n")
    return data


class StopsAtOnce(TrainerCallback):
    """Ends a run before its first step: the notes before the run need none."""

    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"warmup_steps": 6}, "note: all 6 steps are within --warmup_steps 6:"),
        ({"early_lr_steps": 100}, "note: all 6 steps run at 0.2 × the learning rate (--early_lr_steps 100)"),
        ({"freeze_projector_steps": 6}, "note: the projector does not learn in this run: all 6 steps"),
        ({"warmup_steps": 0.5}, None),
    ],
)
def test_a_run_that_never_comes_to_its_learning_rate_says_so(arguments, capsys, values, named):
    main(arguments(**values), [StopsAtOnce()])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ") and "all 6" in line]
    assert [line.startswith(named) for line in notes] == [True] * (named is not None)


def test_a_run_that_is_too_short_for_a_probe_says_so(arguments, train_file, capsys):
    main(arguments(eval_file=str(train_file)), [StopsAtOnce()])
    assert "no listening probe: a run needs at least 50 steps for one, and this run has 6" in capsys.readouterr().out


def test_a_key_that_is_not_used_is_said_before_the_run(arguments, train_file, capsys):
    data = train_file.with_name("with_speakers.jsonl")  # beside its clips
    data.write_text(train_file.read_text().replace('{"id"', '{"speaker": "a", "id"'))
    main(arguments(train_file=str(data), max_steps=1), [StopsAtOnce()])
    said = capsys.readouterr().out
    assert f"note: dialogues with the key `speaker`, which is not used: 12; first at {data}:1\n" in said


@pytest.mark.parametrize("values", [{"text_model": "./gone"}, {"train_file": "gone.jsonl"}])
def test_a_start_that_fails_leaves_no_folder(arguments, values):
    args = arguments(**values)
    with pytest.raises(QwhisperError, match="gone"):
        main(args)
    assert not Path(args.output_dir).exists()


def test_a_run_in_which_no_sample_could_be_used_is_one_of_bad_data(arguments, tmp_path):
    data = only_spoken(with_bad_clips(tmp_path / "data", range(12)))
    with pytest.raises(DataError, match=r"no sample was trained on in 3 steps; 10 dialogues .*clip.*quarantine\.jsonl"):
        main(arguments(train_file=data, max_bad_fraction=1.0, max_steps=3))


def test_a_run_in_which_no_sample_was_finite_is_one_of_bad_numbers(arguments, monkeypatch):
    plant(monkeypatch, loss_times(float("nan")))
    with pytest.raises(NumericalError, match=r"no sample was trained on in 2 steps; .*events\.jsonl"):
        main(arguments(max_steps=2, per_device_train_batch_size=1))


def test_a_bad_dialogue_is_counted_once_however_often_it_comes_up(arguments, tmp_path, capsys):
    args = arguments(train_file=with_bad_clips(tmp_path / "data", [3]), max_bad_fraction=0.5, max_steps=6)
    assert main(args) == 0
    assert len(read_lines(Path(args.output_dir) / "quarantine.jsonl")) == 2  # passes over the data
    assert "Events: none; 0 steps skipped, 1 dialogues quarantined" in last_line(capsys)


def test_too_many_are_not_told_as_dialogues_that_there_are_not(arguments, tmp_path):
    args = arguments(train_file=with_bad_clips(tmp_path / "data", [3]), max_bad_fraction=0.05)
    with pytest.raises(DataError, match=r"^1 times a dialogue could not be used \(of 12, in pass 1 over them\)"):
        main(args)


@pytest.mark.parametrize("spoil", [
    lambda events: (events.unlink(), events.mkdir()),
    lambda events: events.write_text("null\n5\n[]\n{}\n"),
])  # fmt: skip
def test_a_finished_run_says_so_whatever_became_of_its_events(arguments, capsys, spoil):
    args = arguments(max_steps=2)
    events = Path(args.output_dir) / "events.jsonl"
    assert main(args, [At(1, lambda: spoil(events))]) == 0
    assert "No guard had to act" in last_line(capsys)
    if events.is_file():
        events.unlink()  # {} is an event of no kind that is declared


def test_a_callback_that_stops_the_run_before_its_first_step_is_told_of_and_no_checkpoint_is(arguments, capsys):
    assert main(arguments(), [StopsAtOnce()]) == 0
    said = last_line(capsys)
    assert said == "stopped by a callback after 0 of 6 steps, 0 supervised tokens; nothing was saved"


@pytest.mark.parametrize(("step", "code"), [(1, 128 + signal.SIGTERM), (2, 0)])
def test_a_signal_in_the_last_step_comes_too_late_to_stop_anything(arguments, capsys, step, code):
    args = arguments(max_steps=2)
    assert main(args, [At(step, lambda: os.kill(os.getpid(), signal.SIGTERM))]) == code
    assert (Path(args.output_dir) / f"checkpoint-{step}").exists()
    assert last_line(capsys).startswith("done: 2 steps") == (code == 0)


def test_held_out_data_that_is_trained_on_is_noted(arguments, train_file, capsys):
    held_out = train_file.with_name("held.jsonl")
    held_out.write_text("".join(train_file.read_text().splitlines(keepends=True)[:3]))
    assert main(arguments(max_steps=1, eval_file=str(held_out)), [StopsAtOnce()]) == 0
    assert (
        "note: 3 of 3 held-out dialogues are in the training data as they are, the first: " in capsys.readouterr().out
    )
