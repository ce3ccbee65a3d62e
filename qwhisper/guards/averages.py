"""The running average of a group's gradient norm: what a norm is compared with to be called a peak.

After AdaGC (Wang et al., 2025, arXiv 2502.11034, eq. 5): the bound is a multiple of the average, and the average is fed
with norms that were brought down to it. Plain Python; its fields are saved with the run.
"""

import math
import statistics
from dataclasses import dataclass, field

BETA = 0.98  # remembers about 50 steps
FIRST_NORMS = 20  # steps without a bound; their median is where the average starts, so that one peak does not decide it
PEAK = 3.0  # a norm above this many averages is brought down to it
# AdaGC takes 1.05, a tensor at a time. Norms of whole groups at batch 4 vary by a factor of two in sound runs, and what
# a bound of three lets through changes AdamW's step by less than a factor of two.


@dataclass
class NormAverage:
    """Exponential mean and variance of a gradient norm."""

    mean: float = 0.0
    variance: float = 0.0
    first: list[float] = field(default_factory=list)

    @property
    def bound(self) -> float:
        """What a norm is brought down to; infinite while there are too few to know."""
        return math.inf if len(self.first) < FIRST_NORMS else PEAK * self.mean

    def feed(self, norm: float) -> None:
        """A finite norm of a step that was taken, before it was clipped."""
        if len(self.first) < FIRST_NORMS:
            self.first.append(norm)
            self.mean = statistics.median(self.first)
            self.variance = statistics.median((value - self.mean) ** 2 for value in self.first)
            return
        # West (1979), with weights that fall by BETA a step.
        difference = min(norm, self.bound) - self.mean
        change = (1.0 - BETA) * difference
        self.mean += change
        self.variance = BETA * (self.variance + difference * change)
