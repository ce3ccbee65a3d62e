"""Whether a run has learned, by its own numbers. Plain Python; the record is saved with the run as JSON.

Three criteria: whether the trained weights moved, whether the loss fell, and whether the true audio gains more than the
noise. A run counts as having learned nothing only if the numbers leave no doubt: short runs, and runs that began with a
trained model, look flat for good reasons.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qwhisper.guards.alarms import MEMORISED_LOSS, NOISES

WINDOW = 50  # steps at either end whose losses are kept
SHORTEST = 50  # steps of training before a loss that has not fallen means anything
FEWEST = 22  # steps for any direction: two windows of 11 without overlap are 4 standard errors apart
DEAD_STEPS = 3  # steps in a row that must all be worse than guessing
CERTAIN = 4.0  # standard errors of the rank test: one in 30,000 runs without a trend exceeds them
SHARE = 0.01  # of the loss, on the same samples: a smaller fall does not count as learning
NONE = 0.001  # a smaller one does not count as a fall: 60 steps at a rate too low to learn give 0.004
RISE = 1.1  # times the first loss
DEAD = 1.5  # times the loss of a guess, or the very first loss if that is higher
FAR = 2.0, 1.0  # times the very first loss, and nats above it: no order of sound samples brings all last steps there

Direction = Literal["fell", "flat", "rose"]


@dataclass
class Learning:
    """The record of a run's losses.

    weights: each group's checksum before the first step; empty if the record did not start with the run. first, last:
    losses of the first and of the last WINDOW steps that were taken, nats a supervised token. steps: how many were
    taken. first_pass, last_pass: mean loss of the first and of the last whole pass over the data; pass_loss,
    pass_tokens: sums of the pass in progress. first_held_out, last_held_out: held-out loss before the first step and
    the latest; held_out_broke: the last one was not finite. gain, noise: of the last listening probe, at step `probed`.
    """

    weights: dict[str, int] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    steps: int = 0
    first_pass: float | None = None
    last_pass: float | None = None
    pass_loss: float = 0.0
    pass_tokens: int = 0
    first_held_out: float | None = None
    last_held_out: float | None = None
    held_out_broke: bool = False
    gain: float | None = None
    noise: float | None = None
    probed: int = 0

    def observe(self, loss: float, tokens: int, *, pass_ended: bool) -> None:
        """Add a step; `tokens` is 0 if it was not taken."""
        if tokens:
            self.steps += 1
            self.first = self.first if len(self.first) == WINDOW else [*self.first, loss]
            self.last = [*self.last, loss][-WINDOW:]
            self.pass_loss += loss * tokens
            self.pass_tokens += tokens
        if pass_ended:
            if self.pass_tokens:
                mean = self.pass_loss / self.pass_tokens
                if self.first_pass is None:
                    self.first_pass = mean
                else:
                    self.last_pass = mean
            self.pass_loss, self.pass_tokens = 0.0, 0

    @property
    def windows(self) -> tuple[list[float], list[float]]:
        """Losses at the beginning and at the end: equally many, without overlap."""
        count = min(WINDOW, self.steps // 2)
        return self.first[:count], self.last[len(self.last) - count :]

    def ends(self) -> tuple[float | None, float | None]:
        """Losses to report for the beginning and the end: of whole passes over the data, or of the windows."""
        if self.first_pass is not None and self.last_pass is not None:
            return self.first_pass, self.last_pass
        first, last = self.windows
        return (statistics.median(first), statistics.median(last)) if first else (None, None)

    @property
    def passes(self) -> float | None:
        """Mean loss of the last whole pass / that of the first, on the same samples. None before the second."""
        if self.first_pass is None or self.last_pass is None or self.first_pass <= MEMORISED_LOSS:
            return None
        return self.last_pass / self.first_pass

    @property
    def held_out(self) -> float | None:
        """The last held-out loss divided by the first."""
        first, last = self.first_held_out, self.last_held_out
        return last / first if first and last is not None else None

    @property
    def held_out_rose(self) -> bool:
        return self.held_out is not None and self.held_out > 1 + SHARE

    def evaluated(self, loss: float, *, before_first_step: bool) -> None:
        """Add a held-out loss. One that is not finite is recorded as a flag, because JSON has no NaN."""
        finite = loss if math.isfinite(loss) else None
        if before_first_step:
            self.first_held_out = finite
        else:
            self.last_held_out, self.held_out_broke = finite, finite is None

    @property
    def hears(self) -> bool | None:
        """Whether the gain of the true audio exceeds its noise; None if it was not measured."""
        return None if self.gain is None or self.noise is None else self.gain > NOISES * self.noise

    def direction(self) -> Direction | None:
        """The direction of the training loss; None if there were too few steps to tell."""
        if self.steps < FEWEST:
            return None
        ranks, (first, last) = rank_test(*self.windows), self.windows
        passes = self.passes
        rose = ranks >= CERTAIN and statistics.median(last) > max(MEMORISED_LOSS, RISE * statistics.median(first))
        # If a run died at once, only the first step's loss is from a sound model.
        far = min(last) > max(FAR[0] * first[0], FAR[1] + first[0])
        if rose or far or (passes is not None and passes > RISE):
            return "rose"
        if ranks <= -CERTAIN or (passes is not None and passes < 1 - SHARE):
            return "fell"
        return "flat" if self.steps >= SHORTEST else None

    def is_dead(self, guess: float) -> bool:
        """Whether the last steps were all far worse than guessing. guess: loss of a uniform guess, ln(vocabulary)."""
        first, last = self.windows
        if len(last) < DEAD_STEPS:
            return False
        bound = DEAD * max(guess, first[0])
        return not any(loss <= bound for loss in last[-DEAD_STEPS:])

    def learned(self) -> bool:
        """Whether any number shows that it learned."""
        held_out = self.held_out
        fell = self.direction() == "fell" or (held_out is not None and held_out < 1 - SHARE)
        return bool(self.hears) or (fell and self.direction() != "rose" and not self.held_out_rose)

    def nothing(self, weights: Mapping[str, int], *, guess: float, began_trained: bool) -> str | None:
        """Why nothing was learned, or None if that is not certain.

        weights: each group's checksum now. guess: as in `is_dead`. began_trained: the weights came from another run,
        which may have learned all that there is.
        """
        if self.steps and self.weights == weights:
            return "every trained weight is as it was at the beginning"
        if self.is_dead(guess):
            return "the model has become worse than guessing"
        if self.held_out_broke and self.first_held_out is not None:
            return "the held-out loss is no longer a finite number"
        if not self.weights:
            return None
        held_out = self.held_out
        if self.hears or (held_out is not None and held_out < 1 - SHARE):
            return None
        direction = self.direction()
        if direction == "rose":
            return "the loss rose"
        if direction != "flat":
            return None
        same_samples = [ratio for ratio in (held_out, self.passes) if ratio is not None]
        as_before = min(same_samples) >= 1 - NONE if same_samples else rank_test(*self.windows) > 0
        if self.hears is False and as_before:
            return "the loss did not fall, and the true audio is worth no more than its noise"
        if same_samples and min(same_samples) >= 1 and not began_trained:
            return "the loss did not fall"
        return None


def rank_test(first: list[float], last: list[float]) -> float:
    """Number of standard errors by which the last losses exceed the first (Mann and Whitney, 1947; ties count half).

    Ranks, because outliers among the losses would dominate a mean.
    """
    count = len(first)
    if not count:
        return 0.0
    above = sum((b > a) + 0.5 * (b == a) for a in first for b in last)
    return (above - count * count / 2) / math.sqrt(count * count * (2 * count + 1) / 12)
