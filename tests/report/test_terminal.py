"""The lines of a run on a terminal, where a progress bar stands below them, and elsewhere."""

import io
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from qwhisper.report.terminal import StepLines, say

STEP = {"loss": 2.0, "tokens": 7, "grad_norm": 1.0, "learning_rate": 1e-3, "seconds": 3.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(written: str) -> list[str]:
    """The lines of a terminal after this was written to it; the cursor never goes up."""
    lines, column = [""], 0
    for character in written:
        if character == "\n":
            lines.append("")
        column = 0 if character in "\r\n" else column
        if character not in "\r\n":
            lines[-1] = lines[-1][:column] + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@contextmanager
def on_a_terminal():
    """One terminal for stdout and stderr."""
    terminal = Terminal()
    with redirect_stdout(terminal), redirect_stderr(terminal):
        yield terminal


def test_whoever_prints_the_bar_stands_below_it():
    with on_a_terminal() as terminal:
        print("before the first step")
        lines = StepLines(total_steps=3, first_step=0)
        print("a note")
        lines.step(**STEP)
        say("a line of ours")
        print("a callback's", "line")
        print("a warning", file=sys.stderr)
        lines.step(**STEP)
        *above, bar = shown(terminal.getvalue())
        printed = ["before the first step", "a note", "a line of ours", "a callback's line", "a warning"]
        assert above == printed
        assert "/3 [" in bar and "loss 2.000" in bar
        lines.close()
        print("the end")
        assert sys.stdout is sys.stderr is terminal
        assert shown(terminal.getvalue()) == [*printed, "the end", ""]


def test_a_line_that_is_printed_piece_by_piece_stays_whole():
    with on_a_terminal() as terminal:
        lines = StepLines(total_steps=3, first_step=0)
        lines.step(**STEP)
        print("one", end=" ")
        lines.step(**STEP)
        print("line")
        print("without an end", end="")
        lines.close()
        assert shown(terminal.getvalue()) == ["one line", "without an end"]


def test_without_a_terminal_the_first_steps_have_a_line_each(capsys):
    lines = StepLines(total_steps=100, first_step=10)
    for step in range(11, 31):
        lines.step(**STEP)
        if step % 10 == 0:
            lines.line(step=step, **STEP)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["11/100", "12/100", "15/100", "20/100", "30/100"]
    assert printed[0].endswith("3.00 s/step  4 min 27 s left")


def test_a_step_never_has_two_lines(capsys):
    lines = StepLines(total_steps=3, first_step=0)
    for step in (1, 2, 3):
        lines.step(**STEP)
        lines.line(step=step, **STEP)
    assert len(capsys.readouterr().out.splitlines()) == 3
