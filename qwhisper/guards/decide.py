"""Whether a step is taken, and by how much its gradients are scaled. Plain Python: numbers in, a decision out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from qwhisper.guards.averages import BAD, NormAverage

LARGEST_NORM = 1e18  # fp32 can square no more: kernels differ in what they make of it, so it counts as not finite


@dataclass(frozen=True)
class StepStatistics:
    """What is known of a step before it is taken.

    loss: nats a supervised token. gradients: 2-norm of each group's gradients, 0 for a group without any. weights: of
    each group's weights as they are before the step; empty where loss and gradients are finite.
    """

    loss: float
    gradients: dict[str, float]
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def not_finite(self) -> list[str]:
        """What is not finite, in words; weights first, since they make everything else so."""
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
    those of them that no sound run has. bad: skipped, or far above a bound.
    """

    skip: str | None
    grad_norm: float
    factors: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    spikes: dict[str, float] = field(default_factory=dict)
    bad: bool = False


def clip_factor(norm: float, bound: float) -> float:
    """Brings `norm` down to `bound`; a bound of 0 is none."""
    return bound / norm if 0 < bound < norm else 1.0


def decide(
    statistics: StepStatistics,
    averages: Mapping[str, NormAverage],
    *,
    group_bounds: Mapping[str, float],
    max_grad_norm: float,
) -> Decision:
    """Finite check, then each group's fixed and adaptive bound, then the bound on what is left of all together.

    A non-finite number ends the step before it reaches any arithmetic. group_bounds: fixed bounds by group, 0 for none;
    averages: of the groups that have one.
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
