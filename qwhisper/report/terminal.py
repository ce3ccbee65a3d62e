"""A progress bar at the bottom and one line a logging step above it."""

import sys

from tqdm import tqdm
from transformers import logging as hf_logging


class StepLines:
    """The bar shows loss, supervised tokens, gradient norm and the time left; `say` prints above it."""

    def __init__(self, total_steps: int, first_step: int):
        self.total = total_steps
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr,
            disable=not sys.stderr.isatty(), leave=False, smoothing=0.05,
        )  # fmt: skip

    def step(self, *, loss: float, tokens: int, grad_norm: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.3f} · {tokens} tokens · grad norm {grad_norm:.2f}", refresh=False)
        self.bar.update(1)

    def line(
        self, *, step: int, loss: float, tokens: int, grad_norm: float, learning_rate: float, seconds: float
    ) -> None:
        """seconds: wall-clock seconds a step, lately."""
        left = (self.total - step) * seconds
        self.say(
            f"step {step}/{self.total}  loss {loss:.4f}  tokens {tokens}  grad norm {grad_norm:.3f}  "
            f"lr {learning_rate:.2e}  {seconds:.2f} s/step  {format_seconds(left)} left"
        )

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()


def quieten_transformers() -> None:
    """Keeps the library's own bars and notes out of what a command prints."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
