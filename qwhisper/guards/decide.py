"""Whether a step is taken, and by how much its gradients are scaled. Plain Python: numbers in, a decision out.

A norm far above its running average is a peak, or a spike. After AdaGC (Wang et al., 2025, arXiv
2502.11034, eq. 5): the bound is a multiple of the average, and the average is fed with norms reduced to that
bound. `NormAverage`'s fields are saved with the run.

Peaks are ordinary: once most samples are learned, the others lie far above the average. A spike is also above
all recent norms.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

BETA = 0.98  # averages about 50 steps
FIRST_NORMS = 20  # steps without a bound; the average starts at their median, so that one peak does not decide it
PEAK = 3.0  # a norm above this many averages is reduced to it
# AdaGC uses 1.05 for each tensor. Norms of whole groups at batch 4 vary by a factor of two in sound runs, and a norm
# within a bound of three changes AdamW's step by less than a factor of two.
BAD = 10.0  # a norm this many times above its bound makes the step a bad one: it is taken, but counted
# Of 13,500 sound steps of the demo's models, 4 to 14 % had a peak, of up to 931 averages when nearly all was learned;
# 106 were bad, never more than two in a row. None was above 3.3 times the largest recent norm.
SPIKE = 10.0  # a bad step's norm this many times above the largest recent one is a spike
FADE = 0.5 ** (1 / 1000)  # of the largest norm, a step: hard samples may be hundreds of steps apart


@dataclass
class NormAverage:
    """Exponential mean and variance of a gradient norm, and the largest recent norm."""

    mean: float = 0.0
    variance: float = 0.0
    first: list[float] = field(default_factory=list)
    largest: float = 0.0

    @property
    def bound(self) -> float:
        """Larger norms are reduced to this; infinite until FIRST_NORMS are known."""
        return math.inf if len(self.first) < FIRST_NORMS else PEAK * self.mean

    @property
    def spike_bound(self) -> float:
        """A larger norm is a spike."""
        return max(BAD * self.bound, SPIKE * self.largest)

    def feed(self, norm: float) -> None:
        """Add a finite norm of a step that was taken, from before clipping."""
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


LARGEST_NORM = 1e18  # fp32 can't square more, and kernels differ in the result: a larger norm counts as not finite


@dataclass(frozen=True)
class StepStatistics:
    """The numbers of a step before it is taken.

    loss: nats a supervised token. gradients: 2-norm of each group's gradients, 0 for a group without any. weights:
    2-norm of each group's weights before the step; empty if loss and gradients are finite.
    """

    loss: float
    gradients: dict[str, float]
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def not_finite(self) -> list[str]:
        """The numbers that are not finite, by name; weights first, because they break the rest."""
        named = {f"weights of {name}": norm for name, norm in self.weights.items()}
        named |= {"loss": self.loss} | {f"gradient of {name}": norm for name, norm in self.gradients.items()}
        return [what for what, value in named.items() if not abs(value) <= LARGEST_NORM]

    @property
    def broken_weights(self) -> bool:
        return not all(norm <= LARGEST_NORM for norm in self.weights.values())


@dataclass(frozen=True)
class Decision:
    """What to do with a step's gradients.

    skip: why the step is not taken, or None. grad_norm: of all groups, before clipping. factors: what each group's
    gradients are multiplied by (1 is left out). peaks: groups above their adaptive bound, with norm / average; spikes:
    peaks that no sound run has. bad: skipped, or far above a bound.
    """

    skip: str | None
    grad_norm: float
    factors: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    spikes: dict[str, float] = field(default_factory=dict)
    bad: bool = False


def clip_factor(norm: float, bound: float) -> float:
    """The factor that scales `norm` down to `bound`; a bound of 0 means none."""
    return bound / norm if 0 < bound < norm else 1.0


def decide(
    statistics: StepStatistics,
    averages: Mapping[str, NormAverage],
    *,
    group_bounds: Mapping[str, float],
    max_grad_norm: float,
) -> Decision:
    """Check that all is finite; apply each group's fixed and adaptive bound, then the bound on all groups together.

    A step with a non-finite number is skipped before the number reaches any arithmetic. group_bounds: fixed bounds by
    group, 0 for none. averages: of the groups that have one.
    """
    norms = statistics.gradients
    grad_norm = math.hypot(*norms.values())
    if statistics.not_finite:
        return Decision(skip=" and ".join(statistics.not_finite) + " not finite", grad_norm=grad_norm, bad=True)
    adaptive = {name: averages[name].bound if name in averages else math.inf for name in norms}
    peaks = {name: norm / averages[name].mean for name, norm in norms.items() if norm > adaptive[name] > 0}
    factors = {
        name: min(clip_factor(norm, group_bounds.get(name, 0.0)), clip_factor(norm, adaptive[name]))
        for name, norm in norms.items()
    }
    together = math.hypot(*(norm * factors[name] for name, norm in norms.items()))
    whole = clip_factor(together, max_grad_norm)
    return Decision(
        skip=None,
        grad_norm=grad_norm,
        factors={name: factor * whole for name, factor in factors.items() if factor * whole != 1.0},
        peaks=peaks,
        spikes={name: times for name, times in peaks.items() if norms[name] > averages[name].spike_bound},
        bad=any(norms[name] > BAD * adaptive[name] for name in peaks),
    )
