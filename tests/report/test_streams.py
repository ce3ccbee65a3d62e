"""What a run prints where nobody takes it. The pipe whose reader is gone is in tests/test_faults/test_logger.py."""

import fcntl
import io
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from qwhisper.report import relay
from qwhisper.report.streams import RELAY_IS_GONE, unfailing_output
from tests.pipes import full_pipe, read_all

ROOT = Path(__file__).parents[2]
PRINTS = """
import sys
import termios
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


NEVER_WAITS = """
import atexit, os, sys
from qwhisper.report import relay
from qwhisper.report.streams import unfailing_output
relay.PATIENCE_S = {patience_s}
atexit.register(print, "a library's last words")
go, tell = int(sys.argv[1]), int(sys.argv[2])
lost = []
with unfailing_output(on_lost=lost.append):
    {body}
os.write(tell, repr(lost).encode())
sys.exit(7)
"""


class Program:
    """A Python that runs `body` where no write waits, and ends with exit code 7.

    It may wait for `os.read(go, 1)` until `go()`. patience_s: which its relay has with a reader that reads nothing.
    """

    def __init__(self, body: str, *, stdout: int, stderr: int, patience_s: float = relay.PATIENCE_S):
        wait, self._go = os.pipe()
        self._told, tell = os.pipe()
        program = NEVER_WAITS.format(body=body, patience_s=patience_s)
        command = [sys.executable, "-c", program, str(wait), str(tell)]
        self._child = subprocess.Popen(command, cwd=ROOT, pass_fds=[wait, tell], stdout=stdout, stderr=stderr)
        for descriptor in {wait, tell, stdout, stderr}:
            os.close(descriptor)

    def go(self) -> None:
        os.write(self._go, b"!")

    def lost(self) -> list[int]:
        """What on_lost was called with, once the program has ended."""
        assert self._child.wait() == 7
        os.close(self._go)
        return json.loads(read_all(self._told))


def test_no_write_waits_for_a_reader_that_has_stopped_and_the_interpreter_ends():
    reading, writing = full_pipe()
    body = """
    for number in range(500):
        print(number, "." * 500)
        print(number, file=sys.stderr)
        os.write(2, b"by a library\\n")
    if not os.fork():
        os.write(1, b"by a child\\n")
        os._exit(0)
    os.wait()"""
    assert Program(body, stdout=writing, stderr=writing, patience_s=0.1).lost() == [1501]
    assert set(read_all(reading)) == {ord(".")}


def test_a_reader_that_comes_back_gets_the_newest_lines_and_the_number_of_those_dropped():
    body = """
    for number in range(3000):
        print("line", number, "." * 1000)
    print("all printed", file=sys.stderr)
    os.read(go, 1)
    print("the end")"""
    (reading, stdout), (said, stderr) = os.pipe(), os.pipe()
    program = Program(body, stdout=stdout, stderr=stderr)
    with os.fdopen(said, "rb") as lines_of_stderr:
        assert lines_of_stderr.readline() == b"all printed\n"
    program.go()
    lines = read_all(reading).decode().splitlines()
    numbers = [int(line.split()[1]) for line in lines if line.startswith("line ")]
    (place,) = [place for place, line in enumerate(lines) if line.startswith("note: ")]
    dropped = 3000 - len(numbers)
    assert lines[place] == (
        f"note: {dropped} lines of output were dropped here, because nobody read them; metrics.jsonl has every step"
    )
    assert program.lost() == [dropped]
    assert numbers[place] - numbers[place - 1] - 1 == dropped > 1500
    assert numbers == sorted(numbers) and numbers[-1] == 2999
    assert lines[-2:] == ["the end", "a library's last words"]


def test_stdout_and_stderr_of_one_pipe_stay_in_order():
    body = """
    for number in range(200):
        print(number, file=(sys.stdout, sys.stderr)[number % 2], flush=True)"""
    reading, writing = os.pipe()
    program = Program(body, stdout=writing, stderr=writing)
    assert read_all(reading).decode().splitlines() == [*map(str, range(200)), "a library's last words"]
    assert program.lost() == []


def test_a_reader_that_goes_in_mid_run_is_told_of_on_the_other_stream():
    body = """
    print("a line", flush=True)
    os.read(go, 1)
    print("nobody reads it", flush=True)"""
    (reading, stdout), (said, stderr) = os.pipe(), os.pipe()
    program = Program(body, stdout=stdout, stderr=stderr)
    assert os.read(reading, 100) == b"a line\n"
    os.close(reading)
    program.go()
    said = read_all(said).decode()
    assert said.startswith("stdout can't be written ([Errno 32] Broken pipe): the run continues without it;")
    assert said.count("\n") == 1
    assert program.lost() == []


def test_a_paused_terminal_is_still_a_terminal_and_stops_nobody():
    terminal, its_end = os.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 99, 0, 0))
    body = """
    print(sys.stdout.isatty(), os.get_terminal_size(sys.stdout.fileno()).columns)
    os.read(go, 1)
    for number in range(3000):
        print(number, "." * 1000)"""
    program = Program(body, stdout=os.dup(its_end), stderr=os.dup(its_end), patience_s=0.1)
    assert os.read(terminal, 100) == b"True 99\r\n"
    termios.tcflow(its_end, termios.TCOOFF)  # what Ctrl-S does
    program.go()
    assert program.lost() == [3000]
    os.close(its_end)
    os.close(terminal)


def test_a_line_that_arrives_in_two_parts_is_counted_once():
    reading, writing = full_pipe()
    outlet = relay.Outlet("stdout", writing, print)
    outlet.put(b"the beginning")
    given_up = time.monotonic() + 60
    while not outlet.in_hand:  # until its thread has taken it
        assert time.monotonic() < given_up
    outlet.put(b" and the end of a line\n")
    assert outlet.lost == 1
    os.close(reading)


def test_what_is_written_last_before_a_crash_comes_out():
    code = """
import os
from qwhisper.report.streams import unfailing_output
with unfailing_output(on_lost=print):
    print("a line", flush=True)
    os.write(2, b"what a library says\\n")
    os.abort()"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == -signal.SIGABRT
    assert done.stdout == b"a line\nwhat a library says\n"


def test_a_child_that_outlives_the_run_does_not_keep_the_relay():
    reading, writing = full_pipe()
    body = """
    print("a line", flush=True)
    if not os.fork():
        os.read(go, 1)
        os._exit(0)"""
    program = Program(body, stdout=writing, stderr=os.open(os.devnull, os.O_WRONLY), patience_s=0.1)
    assert program.lost() == [1]
    os.close(reading)


def test_what_is_printed_after_a_kill_of_the_relay_comes_out_and_so_does_that_it_was():
    body = """
    import signal, subprocess
    print("a line", flush=True)
    relay = subprocess.check_output(["pgrep", "-P", str(os.getpid()), "-f", "relay.py"])
    os.read(go, 1)
    os.kill(int(relay), signal.SIGKILL)
    os.waitid(os.P_PID, int(relay), os.WEXITED | os.WNOWAIT)
    print("finds it out", flush=True)
    print("another", flush=True)
    os.write(2, b"by a library\\n")"""
    (reading, stdout), (said, stderr) = os.pipe(), os.pipe()
    program = Program(body, stdout=stdout, stderr=stderr)
    assert os.read(reading, 100) == b"a line\n"
    program.go()
    assert read_all(said).decode().splitlines() == [RELAY_IS_GONE, "by a library"]
    assert read_all(reading).decode().splitlines()[-2:] == ["another", "a library's last words"]
    assert program.lost() == []
