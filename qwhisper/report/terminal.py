"""A progress bar at the bottom and one line a logging step above it."""

import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from tqdm import tqdm
from transformers import logging as hf_logging

EARLY_LINES = (1, 2, 5)  # the first steps get a line each if no progress bar shows that the run is alive


def say(text: str, *, to_stderr: bool = False) -> None:
    """Print a line of a run, above the progress bar if there is one."""
    print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)


def note(text: str) -> None:
    """Print something that a user should know and need not act on."""
    say(f"note: {text}")


class StepLines:
    """A bar that shows loss, supervised tokens, gradient norm and the time left; printed lines appear above it.

    It appears with the first step, on a terminal only. Elsewhere EARLY_LINES get a line at any logging interval.
    """

    def __init__(self, total_steps: int, first_step: int):
        self.total = total_steps
        self._first = first_step
        self._num_steps = 0
        self._last_line: int | None = None
        self._bar: tqdm | None = None
        self._above_bar = ExitStack()

    def step(self, *, loss: float, tokens: int, grad_norm: float, learning_rate: float, seconds: float) -> None:
        self._num_steps += 1
        if sys.stderr.isatty():
            bar = self._bar or self._show_bar()
            bar.set_postfix_str(f"loss {loss:.3f} · {tokens} tokens · grad norm {grad_norm:.2f}", refresh=False)
            bar.update(1)
        elif self._num_steps in EARLY_LINES:
            self.line(
                step=self._first + self._num_steps, loss=loss, tokens=tokens, grad_norm=grad_norm,
                learning_rate=learning_rate, seconds=seconds,
            )  # fmt: skip

    def line(
        self, *, step: int, loss: float, tokens: int, grad_norm: float, learning_rate: float, seconds: float
    ) -> None:
        """seconds: recent wall-clock seconds per step."""
        if step == self._last_line:
            return
        self._last_line = step
        left = (self.total - step) * seconds
        say(
            f"step {step}/{self.total}  loss {loss:.4f}  tokens {tokens}  grad norm {grad_norm:.3f}  "
            f"lr {learning_rate:.2e}  {seconds:.2f} s/step  {format_seconds(left)} left"
        )

    def close(self) -> None:
        self._above_bar.close()

    def _show_bar(self) -> tqdm:
        bar = self._bar = tqdm(
            total=self.total, initial=self._first, unit="step", dynamic_ncols=True, file=sys.stderr, leave=False,
            smoothing=0.05,
        )  # fmt: skip
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            above = AboveBar(stream, bar)
            self._above_bar.enter_context(redirect(cast(TextIO, above)))
            self._above_bar.callback(above.finish)
        self._above_bar.callback(bar.close)  # called first of these
        return bar


class AboveBar:
    """A stream of a terminal with a progress bar: clears the bar, writes whole lines, and draws it again."""

    def __init__(self, stream: TextIO, bar: tqdm):
        self._stream = stream
        self._bar = bar
        self._begun = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        lines, end, self._begun = (self._begun + text).rpartition("\n")
        if end:
            self._bar.clear()
            self._stream.write(lines + end)
            self._stream.flush()
            self._bar.refresh()
        return len(text)

    def finish(self) -> None:
        """Write a last line that has no newline."""
        self._stream.write(self._begun)
        self._begun = ""


def quieten_transformers() -> None:
    """Keep transformers' own bars and notes out of a command's output."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
