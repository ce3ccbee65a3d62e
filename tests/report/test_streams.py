"""What a run prints where nobody takes it. The pipe whose reader is gone is in tests/test_faults/test_logger.py."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwhisper.report.streams import unfailing_output

ROOT = Path(__file__).parents[2]
PRINTS = """
import sys
from qwhisper.report.streams import unfailing_output
with unfailing_output():
    print("a line")
    print("a warning", file=sys.stderr)
sys.exit(7)
"""


def ended(**streams) -> tuple[int, str]:
    """Exit code and stderr of a Python that prints a line and a warning, and ends with exit code 7."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    streams = {"stderr": subprocess.PIPE} | streams
    done = subprocess.run([sys.executable, "-c", PRINTS], cwd=ROOT, text=True, env=buffered, **streams)
    return done.returncode, done.stderr


def test_a_full_disk_is_said_once_and_the_interpreter_ends_with_the_exit_code_that_it_was_given():
    with open("/dev/full", "w") as full:
        code, said = ended(stdout=full)
    assert code == 7
    assert said.count("stdout can't be written ([Errno 28]") == said.count("a warning") == said.count("\n") - 1 == 1


def test_nothing_is_said_where_stderr_is_full_as_well():
    with open("/dev/full", "w") as full:
        assert ended(stdout=full, stderr=full)[0] == 7


def test_a_terminal_that_was_closed_is_no_error():
    terminal, program = os.openpty()
    os.close(terminal)
    code, said = ended(stdout=program)
    os.close(program)
    assert code == 7 and said.count("stdout can't be written ([Errno 5]") == 1


def test_a_stream_without_a_descriptor_is_said_once_to_be_dead(monkeypatch, capsys):
    class Dead(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("gone")

    monkeypatch.setattr(sys, "stdout", Dead())
    with unfailing_output():
        print("a line")
        print("another")
    assert capsys.readouterr().err.count("stdout can't be written (gone)") == 1


def test_streams_that_are_closed_from_the_beginning_are_there_and_take_everything(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with unfailing_output():
        sys.stdout.write("a line")
        assert not sys.stderr.isatty()
    assert sys.stdout is None and sys.stderr is None


def test_a_sound_stream_gets_what_is_printed_and_is_put_back(capsys):
    before = sys.stdout

    @unfailing_output()
    def prints_and_raises():
        print("a line")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prints_and_raises()
    assert sys.stdout is before
    assert capsys.readouterr() == ("a line\n", "")
