"""Files that are none or no more, decoders that fail, and many bad clips at once."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import TrainerCallback

from qwhisper.data import clips, files
from qwhisper.data.audio import load_audio
from qwhisper.data.source import epoch_order
from qwhisper.errors import BadClipError
from qwhisper.train import loop
from tests.test_faults import broken_data as broken
from tests.test_faults.broken_data import NAMED, REFUSED, BrokenRun, unchecked, write_tone
from tests.test_faults.matrix import fault


@pytest.fixture
def run(arguments, tmp_path):
    return BrokenRun(arguments, tmp_path)


class At(TrainerCallback):
    """Calls `act` when training begins, or after that many steps."""

    def __init__(self, act: Callable[[], object], *, after_step: int = 0):
        self.act, self.after_step = act, after_step

    def on_train_begin(self, args, state, control, **kwargs):
        if self.after_step == 0:
            self.act()

    def on_step_end(self, args, state, control, **kwargs):
        if self.after_step == state.global_step:
            self.act()


class Hung(BaseException):
    """No error of the file's, which `load_audio` would name: the test gave up waiting."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def give_up(number, frame):
        raise Hung

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def paths_unchecked(monkeypatch) -> None:
    monkeypatch.setattr(clips, "resolve_path", lambda location, where, roots, faults: str(roots[0] / location))


@fault("a FIFO in place of a clip", of="data", guarantee=REFUSED, without=unchecked(clips, "file_fault"))
def test_fifo(run):
    run.refused(run.train(os.mkfifo), "is a FIFO, not a file")


def hangs(call) -> str:
    try:
        with at_most(1.0):
            call()
    except Hung:
        return "hung"
    except BadClipError as error:
        return str(error)
    return "read"


@fault(
    "a FIFO that takes a clip's place during the run",
    of="data",
    guarantee="named and never read: the run does not wait for its writer",
    without=unchecked(files, "kind_fault"),
)
def test_fifo_that_comes_later(tmp_path):
    os.mkfifo(tmp_path / "d3.wav")
    assert hangs(lambda: load_audio(tmp_path / "d3.wav")) == f"{tmp_path}/d3.wav is a FIFO, not a file; leave it out"


@fault("a folder in place of a clip", of="data", guarantee=REFUSED, without=unchecked(clips, "file_fault"))
def test_folder(run):
    run.refused(run.read(os.mkdir), "is a folder, not a file")


@fault("a device in place of a clip", of="data", guarantee=REFUSED, without=unchecked(clips, "file_fault"))
def test_device(run):
    outcome = run.train(
        change=lambda record: record["messages"][0]["content"][0].update(audio="/dev/zero"), data_root="/dev"
    )
    assert outcome.code == 3
    assert "audio file '/dev/zero' is a device, not a file" in outcome.message


@fault("a link that leads out of the data's folder", of="data", guarantee=REFUSED, without=paths_unchecked)
def test_link_outside(run, tmp_path):
    write_tone(tmp_path / "private.wav")
    run.refused(run.read(lambda path: path.symlink_to(tmp_path / "private.wav")), "lies outside")


@fault("a shell command in place of a clip", of="data", guarantee=REFUSED, without=paths_unchecked)
def test_pipe(run, tmp_path):
    change = lambda record: record["messages"][0]["content"][0].update(audio=f"touch {tmp_path}/ran |")  # noqa: E731
    run.refused(run.read(change=change), "is a Kaldi pipe, and commands are never run")
    assert not (tmp_path / "ran").exists()


@fault("a clip that is gone when the run begins", of="data", guarantee=NAMED, without=broken.no_rejections)
def test_gone_at_first_use(run):
    run.named(run.train(callbacks=[At((run.data / "d3.wav").unlink)]), "does not exist", checked=False)


@fault(
    "a clip that goes between two epochs",
    of="data",
    guarantee="trained on while it was there, then quarantined and named",
    without=broken.silence_stands_in,
)
def test_gone_between_epochs(run):
    outcome = run.train(callbacks=[At((run.data / "d3.wav").unlink, after_step=2)], max_steps=4)
    assert outcome.code == 0 and outcome.finite
    assert "does not exist" in run.quarantined.get("d3", "")
    assert run.trained_tokens == broken.ANSWER_TOKENS * (2 * broken.COUNT - 1)


def links_followed(monkeypatch) -> None:
    monkeypatch.setattr(files, "open_without_links", lambda path: os.open(path, files.READ))


@fault("a link that takes a clip's place during the run", of="data", guarantee=NAMED, without=links_followed)
def test_link_that_comes_later(run, tmp_path):
    write_tone(tmp_path / "private.wav")

    def swap():
        (run.data / "d3.wav").unlink()
        (run.data / "d3.wav").symlink_to(tmp_path / "private.wav")

    run.named(
        run.train(callbacks=[At(swap)]), "a link appeared in this path", str(tmp_path / "private.wav"), checked=False
    )


# Decoders.


class OddError(RuntimeError):
    """As a codec's own library might raise."""


def decoder_raises(monkeypatch, error: Exception) -> None:
    """While it reads d3."""
    read = soundfile.SoundFile.read

    def planted(self, *args, **kwargs):
        if Path(os.readlink(f"/proc/self/fd/{self.name}")).name == "d3.wav":
            raise error
        return read(self, *args, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "read", planted)


@fault("a decoder that raises an unusual type of error", of="data", guarantee=NAMED, without=broken.few_errors_named)
def test_odd_decoder_error(run, monkeypatch):
    decoder_raises(monkeypatch, OddError("bit reservoir"))
    run.named(run.read(), "unreadable audio (OddError: bit reservoir)")


@fault("a decoder that runs out of memory", of="data", guarantee=NAMED, without=broken.few_errors_named)
def test_decoder_out_of_memory(run, monkeypatch):
    decoder_raises(monkeypatch, MemoryError("a table of 2^60"))
    run.named(run.read(), "out of memory while it was read (MemoryError: a table of 2^60)")


@fault("a disk that can't read a clip", of="data", guarantee=NAMED, without=broken.few_errors_named)
def test_input_output_error(run, monkeypatch):
    decoder_raises(monkeypatch, OSError(errno.EIO, "Input/output error"))
    run.named(run.train(), "Input/output error")


# Many at once.


class Weights(TrainerCallback):
    """Trainable weights and moments at the edges of every step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        weights = [p.detach() for p in model.parameters() if p.requires_grad]
        moments = [value for values in optimizer.state.values() for value in values.values()]
        self.seen.append([t.cpu().clone() for t in weights + moments])


@fault(
    "a step all of whose clips are bad",
    of="data",
    guarantee="all are named, the step is skipped, weights, moments and step counts are bit-identical after it",
    without=broken.silence_stands_in,
)
def test_whole_step_is_bad(run):
    second = epoch_order(broken.COUNT, seed=7, epoch=0)[4:]
    weights = Weights()

    def spoil():
        for number in second:
            (run.data / f"d{number}.wav").write_bytes(b"")

    outcome = run.train(callbacks=[At(spoil), weights], max_steps=3)
    assert outcome.code == 0 and outcome.finite
    before, after = weights.seen[1:3]
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(before, after, strict=True))
    assert set(run.quarantined) == {f"d{number}" for number in second}
    assert [event["reason"] for event in outcome.events if event["kind"] == "skipped"] == ["no sample left"]


@fault(
    "more bad clips than --max_bad_fraction",
    of="data",
    guarantee="exit code 3, naming the file that lists them all",
    without=unchecked(loop, "quarantine"),
)
def test_too_many(run):
    outcome = run.train(lambda path: path.write_bytes(b""), max_bad_fraction=0.1)
    assert outcome.code == 3
    assert str(run.output / "quarantine.jsonl") in outcome.message
    assert "d3" in run.quarantined
