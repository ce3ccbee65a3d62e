"""`--dynamic_lr`: a learning rate that steps back where training is uneasy, and returns when it no longer is.

The rule: uneasy is a step where the loss does not fall and two of the last WINDOW steps had a peak (a group's gradient
norm above its adaptive bound) or were skipped; and one where the loss rises. It brings the rate down by DOWN, never
below LEAST, and at most once in WINDOW steps. CALM steps without any bring it up by UP, never above 1, and again after
every further WINDOW. Going up takes longer than going down, so that it does not swing.

The loss falls where its average over about the last 20 steps is below that over about 100, and rises where it is above
by RISE standard errors. Peaks alone would not do: a run that learns well has them in one step of eight (averages.py).
Plain Python; its fields are saved with the run.
"""

import math
from dataclasses import dataclass

from qwhisper.guards.peaks import RecentPeaks

WINDOW, CALM = 20, 60
DOWN, UP, LEAST = 0.7, 1.1, 0.1
FAST, SLOW = 1 / 20, 1 / 100  # weights of a new loss in the two averages
RISE = 2.5  # in 13,500 sound steps twice
KNOWN = 40  # losses before the two averages say anything


@dataclass
class DynamicRate(RecentPeaks):
    """factor: on the learning rate. last_change, last_uneasy: the steps in which it last changed, and was last uneasy.

    fast, slow, variance: of the losses, of which there were `losses`.
    """

    factor: float = 1.0
    last_change: int = 0
    last_uneasy: int = 0
    losses: int = 0
    fast: float = 0.0
    slow: float = 0.0
    variance: float = 0.0

    def observe(self, loss: float, peak: bool) -> bool:
        """One step; True where the factor has changed. loss: one that is not finite changes no average."""
        if math.isfinite(loss):
            self._feed(loss)
        self.note(peak, WINDOW)
        if self._uneasy():
            self.last_uneasy = self.step
        if self.step - self.last_change < WINDOW:
            return False
        if self.last_uneasy == self.step and self.factor > LEAST:
            return self._change(DOWN)
        if self.step - self.last_uneasy >= CALM and self.factor < 1.0:
            return self._change(UP)
        return False

    def _feed(self, loss: float) -> None:
        self.losses += 1
        fast, slow = max(FAST, 1 / self.losses), max(SLOW, 1 / self.losses)  # the mean of all until there are enough
        self.fast += fast * (loss - self.fast)
        difference = loss - self.slow
        self.slow += slow * difference
        self.variance = (1 - slow) * (self.variance + slow * difference**2)

    def _uneasy(self) -> bool:
        error = math.sqrt(self.variance * FAST / (2 - FAST))  # of an exponential average of independent losses
        rises, falls = self.fast > self.slow + RISE * error, self.fast < self.slow
        return self.losses >= KNOWN and (rises or (len(self.peaks) >= 2 and not falls))

    def _change(self, by: float) -> bool:
        self.factor = min(1.0, max(LEAST, self.factor * by))
        self.last_change = self.step
        return True
