"""The running average of a group's gradient norm: what a norm is compared with to be called a peak, or a spike.

After AdaGC (Wang et al., 2025, arXiv 2502.11034, eq. 5): the bound is a multiple of the average, and the average is fed
with norms that were brought down to it. Plain Python; its fields are saved with the run.

A peak is ordinary: once most samples are known, those that are not yet lie far above the average. A spike is above
anything that the run has lately had, too.
"""

import math
import statistics
from dataclasses import dataclass, field

BETA = 0.98  # remembers about 50 steps
FIRST_NORMS = 20  # steps without a bound; their median is where the average starts, so that one peak does not decide it
PEAK = 3.0  # a norm above this many averages is brought down to it
# AdaGC takes 1.05, a tensor at a time. Norms of whole groups at batch 4 vary by a factor of two in sound runs, and what
# a bound of three lets through changes AdamW's step by less than a factor of two.
BAD = 10.0  # a norm this many times above its bound makes the step a bad one: it is taken, but counted
# Of 13,500 sound steps of the demo's models, 4 to 14 % had a peak, of up to 931 averages where nearly all was learned;
# 106 were bad, never more than two in a row. None was above 3.3 times the largest norm lately.
SPIKE = 10.0  # a bad step's norm this many times above the largest lately is a spike
FADE = 0.5 ** (1 / 1000)  # a step, of the largest norm: hard samples may be hundreds of steps apart


@dataclass
class NormAverage:
    """Exponential mean and variance of a gradient norm, and the largest lately."""

    mean: float = 0.0
    variance: float = 0.0
    first: list[float] = field(default_factory=list)
    largest: float = 0.0

    @property
    def bound(self) -> float:
        """What a norm is brought down to; infinite while there are too few to know."""
        return math.inf if len(self.first) < FIRST_NORMS else PEAK * self.mean

    @property
    def spike_bound(self) -> float:
        """Above it a norm is a spike."""
        return max(BAD * self.bound, SPIKE * self.largest)

    def feed(self, norm: float) -> None:
        """A finite norm of a step that was taken, before it was clipped."""
        if len(self.first) < FIRST_NORMS:
            self.first.append(norm)
            self.mean = statistics.median(self.first)
            self.variance = statistics.median((value - self.mean) ** 2 for value in self.first)
            self.largest = min(max(self.first), BAD * PEAK * self.mean)
            return
        self.largest = max(FADE * self.largest, norm if norm <= self.spike_bound else self.bound)
        # West (1979), with weights that fall by BETA a step.
        difference = min(norm, self.bound) - self.mean
        change = (1.0 - BETA) * difference
        self.mean += change
        self.variance = BETA * (self.variance + difference * change)
