"""Disks that are full, fail or can only be read, while a run saves."""

import contextlib
import errno
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from qwhisper.checkpoint import folders, manifest
from qwhisper.checkpoint.folders import checkpoints
from qwhisper.checkpoint.manifest import check_manifest
from qwhisper.checkpoint.reading import choose_checkpoint
from qwhisper.engine.executor import Executor
from qwhisper.errors import DiskError
from qwhisper.train import loop, state
from qwhisper.train.session import save_checkpoint
from tests.test_faults.inject import outcome_of
from tests.test_faults.kill_shim import Operations, fail, operations_of
from tests.test_faults.matrix import fault
from tests.train.helpers import make_run, read_lines, step

pytestmark = pytest.mark.trains_in_forks

Damage = Callable[[Path], None]


def disk_errors_are_let_through(monkeypatch) -> None:
    def save(run, *, stopped=False):
        save_checkpoint(run)
        return True

    monkeypatch.setattr(loop, "try_to_save", save)


SAVES = {"max_steps": 6, "save_steps": 2, "freeze_projector_steps": 0}


def run_with_failing_save(arguments, monkeypatch, failing: Callable[[], None], *, at_step: int = 4, **values):
    """Of a run whose save at `at_step` meets `failing` in the middle, and the terminal's lines about it."""
    honest = state.TrainState.write
    met = []

    def write(self, folder):
        honest(self, folder)
        if self.step == at_step:
            met.append(folder)
            failing()

    monkeypatch.setattr(state.TrainState, "write", write)
    outcome = outcome_of(arguments(**SAVES | values))
    assert met
    return outcome


def assert_went_on(outcome, args, told: str, said: str) -> None:
    assert outcome.code == 0, outcome.message
    failed = [event for event in outcome.events if event["kind"] == "save_failed"]
    assert [event["step"] for event in failed] == [4] and told in failed[0]["error"]
    lines = [line for line in said.splitlines() if "step 4: not saved" in line]
    assert len(lines) == 1 and told in lines[0] and "checkpoint-2" in lines[0] and "disk" in lines[0]
    folder = Path(args.output_dir)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-6"]
    assert not list(folder.glob(".checkpoint-*"))


@fault(
    "the disk is full in a periodic save",
    of="disk",
    guarantee="the run continues; one event and one line say what to do; older checkpoints are unchanged",
    without=disk_errors_are_let_through,
)
def test_full_disk_in_a_save(arguments, monkeypatch, capsys):
    outcome = run_with_failing_save(arguments, monkeypatch, fail(errno.ENOSPC))
    assert_went_on(outcome, arguments(), "No space left on device", capsys.readouterr().out)


def errors_of_fsync_are_ignored(monkeypatch) -> None:
    honest = manifest.flush

    def flush(path):
        with contextlib.suppress(OSError):
            honest(path)

    monkeypatch.setattr(manifest, "flush", flush)


@fault(
    "a disk that reports a failed write only when it is flushed (EIO at fsync)",
    of="disk",
    guarantee="that checkpoint is not counted as written; the run continues",
    without=errors_of_fsync_are_ignored,
)
def test_failing_disk_in_a_save(arguments, monkeypatch, capsys):
    honest = os.fsync

    def fsync(descriptor):
        if ".checkpoint-4.writing/optimizer" in os.readlink(f"/proc/self/fd/{descriptor}"):
            fail(errno.EIO)()
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    outcome = outcome_of(arguments(**SAVES))
    assert_went_on(outcome, arguments(), "Input/output error", capsys.readouterr().out)


@fault(
    "the disk turns read-only in the middle of a run",
    of="disk",
    guarantee="the run continues; one event and one line say what to do; older checkpoints are unchanged",
    without=disk_errors_are_let_through,
)
def test_read_only_disk(arguments, monkeypatch, capsys):
    honest = os.mkdir

    def mkdir(path, *args, **kwargs):
        if ".checkpoint-4" in str(path):
            fail(errno.EROFS)()
        honest(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    outcome = outcome_of(arguments(**SAVES))
    assert_went_on(outcome, arguments(), "Read-only file system", capsys.readouterr().out)


@fault(
    "a file limit or quota is reached, enforced by the kernel, in whichever library writes",
    of="disk",
    guarantee="it is treated as an error of the disk, whichever library reports it: the run continues",
    without=lambda monkeypatch: monkeypatch.setattr(folders, "FOREIGN_OS_ERROR", re.compile("never")),
)
def test_quota(arguments, monkeypatch):
    run, samples = make_run(arguments(**SAVES))
    step(run, samples[:4])
    save_checkpoint(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = sorted({path.stat().st_size for path in (run.log.folder / "checkpoint-1").iterdir()})
    try:
        for limit in sizes:  # the files that are larger fail, written by any of Python, tokenizers, safetensors
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit - 1, hard))
            try:
                save_checkpoint(run)
                raised = None
            except Exception as error:
                raised = error
            assert isinstance(raised, OSError) and raised.errno == errno.EFBIG, repr(raised)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in run.log.folder.glob("*checkpoint-*")] == ["checkpoint-1"]


@fault(
    "the disk is full at any write, fsync or rename of a save",
    of="disk",
    guarantee="an error of the disk; the older checkpoint stays, nothing is left of the new one",
    without=lambda monkeypatch: monkeypatch.setattr(folders, "shutil", Mock()),
)
def test_full_disk_anywhere_in_a_save(arguments):
    run, samples = make_run(arguments(**SAVES))
    step(run, samples[:4])
    save_checkpoint(run)
    step(run, samples[4:8])
    names = operations_of(lambda: save_checkpoint(run), run.log.folder)
    shutil.rmtree(run.log.folder / "checkpoint-2")
    for number, name in enumerate(names):
        if name.startswith("mkdir") and number:
            continue  # the folder is there already, so that nobody minds
        with Operations(run.log.folder, at=number, act=fail(errno.ENOSPC)), pytest.raises(OSError, match="No space"):
            save_checkpoint(run)
        left = sorted(path.name for path in run.log.folder.glob("*checkpoint-*"))
        if name != "fsync .":  # the last: the new one is there, but its name may not be on the disk yet
            assert left == ["checkpoint-1"], name
    check_manifest(run.log.folder / "checkpoint-1")


@fault(
    "the last save of a run fails",
    of="disk",
    guarantee="exit code 8 names the last whole checkpoint: the run does not end in success",
    without=disk_errors_are_let_through,
)
def test_last_save_fails(arguments, monkeypatch):
    outcome = run_with_failing_save(arguments, monkeypatch, fail(errno.ENOSPC), at_step=6)
    assert outcome.code == DiskError.exit_code == 8 and "checkpoint-4" in outcome.message
    end = read_lines(Path(arguments().output_dir) / "events.jsonl")[-1]
    assert (end["kind"], end["exit_code"], end["step"]) == ("end", 8, 6)


def test_the_only_save_of_a_run_fails(arguments, monkeypatch, capsys):
    outcome = run_with_failing_save(arguments, monkeypatch, fail(errno.ENOSPC), at_step=2, max_steps=2)
    assert outcome.code == 8 and "there is no whole checkpoint. Make room" in outcome.message
    assert outcome.message.endswith("then start again") and "None" not in capsys.readouterr().out


@fault(
    "the save of the best checkpoint fails",
    of="disk",
    guarantee="the best one so far stays the best, and is not deleted",
    without=lambda monkeypatch: monkeypatch.setattr(loop, "newest_usable", lambda folder: (None, [])),
)
def test_best_save_fails(arguments, monkeypatch, train_file):
    losses = iter([4.0, 3.0, 2.0, 3.5])  # the first is of before the first step
    monkeypatch.setattr(Executor, "evaluate", lambda self, samples: next(losses))
    args = arguments(**SAVES, save_total_limit=1, eval_file=str(train_file))
    outcome = run_with_failing_save(
        arguments, monkeypatch, fail(errno.ENOSPC), save_total_limit=1, eval_file=str(train_file)
    )
    assert outcome.code == 0, outcome.message
    assert [path.name for path in checkpoints(Path(args.output_dir))] == ["checkpoint-2", "checkpoint-6"]
    assert choose_checkpoint(args.output_dir).name == "checkpoint-2"
