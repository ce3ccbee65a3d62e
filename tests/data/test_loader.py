"""Rows of each step, read by processes that may die: the same samples, with any number of them, from any script."""

import dataclasses
import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from qwhisper.data import loader, processes, worker
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.light_tokenizer import dumps
from qwhisper.data.loader import step_samples
from qwhisper.data.source import ShuffledDialogues, epoch_position
from qwhisper.train.run import main
from qwhisper.train.signals import Stopped
from tests.data.conftest import CHATML, byte_tokenizer, dialogue_of, reply, user
from tests.test_faults.inject import outcome_of
from tests.test_faults.kill_shim import fail
from tests.test_faults.lives import At
from tests.train.helpers import checkpoint_tensors, same_bits
from tests.train.test_resume import StopAfter
from tests.workers import CrashingReader, worker_pids


@pytest.fixture
def encoder(frames) -> DialogueEncoder:
    return DialogueEncoder(byte_tokenizer(CHATML), frames, audio_token_id=300)


SCRIPT = """
import pickle, sys
import qwhisper
from qwhisper.data.loader import step_samples
from qwhisper.data.source import ShuffledDialogues

dialogues, encoder = pickle.load(open("encoder.pickle", "rb"))
source = ShuffledDialogues(dialogues=dialogues, samples_per_step=2, seed=0)
steps = step_samples(source, encoder, num_workers=1)
print([sample.id for _ in range(3) for sample in next(steps).samples], qwhisper.__file__)
"""
EXEC = "import sys; exec(sys.stdin.read(), {'__name__': '__main__'})"
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("how", ["script", "stdin", pytest.param("exec", marks=pytest.mark.slow), "zip"])
def test_a_script_without_a_main_guard_and_a_notebook_read_with_workers(tmp_path, encoder, how):
    dialogues = [replace(dialogue_of(user("Pitch?"), reply("low")), id=str(n)) for n in range(6)]
    (tmp_path / "encoder.pickle").write_bytes(dumps((dialogues, encoder)))
    (tmp_path / "script.py").write_text(SCRIPT)
    if how == "zip":
        with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
            archive.write(tmp_path / "script.py", "__main__.py")
            for path in (ROOT / "qwhisper").rglob("*.py"):
                archive.write(path, path.relative_to(ROOT))
    arguments = {"script": ["script.py"], "stdin": ["-"], "exec": ["-c", EXEC], "zip": ["app.zip"]}[how]
    done = run_python(arguments, tmp_path, SCRIPT, with_package=how != "zip")
    read, _, place = done.partition("] ")
    assert sorted(re.findall(r"\d", read)) == list("012345") and done.count("\n") == 1
    assert place.startswith(str(tmp_path / "app.zip" if how == "zip" else ROOT))


def run_python(arguments: list[str], folder: Path, given: str, *, with_package: bool = True) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT) if with_package else ""}
    done = subprocess.run(
        [sys.executable, *arguments], input=given, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("how", ["script", "stdin"])
def test_training_from_a_script_without_a_main_guard_and_from_a_notebook(arguments, tmp_path, how):
    values = vars(arguments(max_steps=3, save_steps=3, dataloader_num_workers=2))
    script = (
        "from qwhisper.train.arguments import TrainArguments\nfrom qwhisper.train.run import main\n"
        f"print('exit code', main(TrainArguments(**{values!r})))\n"
    )
    (tmp_path / "script.py").write_text(script)
    said = run_python(["script.py"] if how == "script" else ["-"], tmp_path, script)
    assert said.count("exit code 0") == said.count("exit code") == 1


def test_a_run_that_can_start_no_process_again_ends_with_advice_and_quarantines_nothing(arguments, monkeypatch):
    args = arguments(dataloader_num_workers=1, max_steps=9)

    def killed_by_the_system():
        monkeypatch.setattr(processes, "_start", lambda descriptor: fail(errno.EAGAIN)())
        for pid in worker_pids():
            os.kill(pid, signal.SIGKILL)

    outcome = outcome_of(args, [At(3, killed_by_the_system)])
    assert outcome.code == 3, outcome.message
    assert "no process could be started" in outcome.message and "--dataloader_num_workers 1" in outcome.message
    assert not (Path(args.output_dir) / "quarantine.jsonl").exists()


@pytest.mark.parametrize("position", [None, epoch_position(1, 8)])
def test_same_samples_from_any_position_with_any_number_of_workers(encoder, position):
    dialogues = [replace(dialogue_of(user("Pitch?"), reply(str(n))), id=str(n)) for n in range(12)]
    source = ShuffledDialogues(dialogues=dialogues, samples_per_step=4, seed=1)

    def taken(num_workers: int) -> list:
        steps = step_samples(source, encoder, position=position, num_workers=num_workers)
        return [
            ([(sample.id, sample.labels.tolist()) for sample in step.samples], step.position)
            for step in itertools.islice(steps, 7)
        ]

    expected = taken(0)
    assert taken(2) == expected and len(expected[0][0]) == 4


def test_what_kills_its_reader_is_named_and_the_rest_is_read(encoder, monkeypatch):
    dialogues = [replace(dialogue_of(user("hi"), reply("yes")), id=name) for name in ("a", "killer", "b")]
    monkeypatch.setattr(loader, "DialogueReader", partial(CrashingReader, ids=frozenset({"killer"})))
    first, killer, last = [item for (item,) in loader.read_in_order(dialogues, encoder, 1, chunk=1)]
    assert killer.reason == "t.jsonl:1: a process that reads it is lost (signal 9); convert it, or leave it out"
    expected = encoder.encode(dialogues[0]).input_ids.tolist()
    assert [row.input_ids.tolist() for row in (*first, *last)] == [expected] * 2
    assert worker_pids() == []


def test_the_search_for_what_kills_a_reader_is_left_at_a_signal(encoder, monkeypatch):
    dialogues = [replace(dialogue_of(user("hi"), reply("yes")), id="killer")]
    monkeypatch.setattr(loader, "DialogueReader", partial(CrashingReader, ids=frozenset({"killer"})))
    honest, searching, left = loader.how_it_dies, [], []

    def search(work, dialogue, poll):
        searching.append(dialogue.id)
        try:
            return honest(work, dialogue, poll)
        except Stopped:
            left.append(dialogue.id)
            raise

    def poll():
        if searching:
            raise Stopped

    monkeypatch.setattr(loader, "how_it_dies", search)
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    with pytest.raises(Stopped):
        list(loader.read_in_order(dialogues, encoder, 1, poll=poll))
    assert left == ["killer"] and worker_pids() == []


# An added token after white space, typed ones, accents, an answer with reasoning, one with calls.


def test_resume_is_bit_exact_with_two_workers_and_keeps_the_pack_size(arguments, tmp_path):
    values = {"lora_dropout": 0.2, "max_steps": 4, "save_steps": 100, "max_tokens_per_pack": "70"}
    whole = arguments(output_dir=str(tmp_path / "whole"), **values)
    assert main(whole) == 0
    parts = arguments(output_dir=str(tmp_path / "parts"), dataloader_num_workers=2, **values)
    assert main(parts, [StopAfter(2)]) == 0
    assert main(dataclasses.replace(parts, resume_from_checkpoint="latest")) == 0
    ends = [checkpoint_tensors(tmp_path / name / "checkpoint-4") for name in ("whole", "parts")]
    assert same_bits(*ends) == []
    states = [json.loads((tmp_path / name / "checkpoint-4/state.json").read_text()) for name in ("whole", "parts")]
    for state in states:
        del state["probe"]  # seconds
    assert states[0] == states[1] and states[0]["max_tokens_per_pack"] == 70
