"""Whether a step is taken, and by how much its gradients are scaled. Plain Python: numbers in, a decision out."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decision:
    """What to do with a step's gradients.

    skip: why the step is not taken, or None. factors: what each group's gradients are multiplied by (1 is left out).
    """

    skip: str | None
    grad_norm: float
    factors: dict[str, float] = field(default_factory=dict)


def clip_factor(norm: float, bound: float) -> float:
    """Brings `norm` down to `bound`; a bound of 0 is none."""
    return bound / norm if 0 < bound < norm else 1.0


def decide(statistics: dict[str, float], *, group_bounds: dict[str, float], max_grad_norm: float) -> Decision:
    """Finite check, then the groups' own bounds, then the bound on what is left of them together.

    statistics: "loss" and each group's gradient norm. A non-finite number ends the step before it reaches any
    arithmetic.
    """
    bad = [name for name, value in statistics.items() if not math.isfinite(value)]
    norms = {name: value for name, value in statistics.items() if name != "loss"}
    if bad:
        what = " and ".join("loss" if name == "loss" else f"gradient of {name}" for name in bad)
        return Decision(skip=f"{what} not finite", grad_norm=math.hypot(*norms.values()))
    factors = {name: clip_factor(norm, group_bounds.get(name, 0.0)) for name, norm in norms.items()}
    together = math.hypot(*(norm * factors[name] for name, norm in norms.items()))
    whole = clip_factor(together, max_grad_norm)
    scaled = {name: factor * whole for name, factor in factors.items() if factor * whole != 1.0}
    return Decision(skip=None, grad_norm=math.hypot(*norms.values()), factors=scaled)
