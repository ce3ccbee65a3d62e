"""What the guards remember from step to step, and what follows a run of bad steps. Plain Python, saved with the run."""

from dataclasses import dataclass, field
from typing import Literal

from qwhisper.guards.averages import NormAverage
from qwhisper.guards.decide import Decision, StepStatistics
from qwhisper.guards.loss_scale import LossScale
from qwhisper.guards.rate import DynamicRate
from qwhisper.guards.switch import ClampSwitch

SNAPSHOT_STEPS = 50  # clean steps between two snapshots
REWIND_RATE = 0.5  # factor on the learning rate after each rewind
ALL = "all"  # the average of all groups' norm together: a metric, no bound

Act = Literal["go on", "rewind", "stop"]


@dataclass
class GuardState:
    """averages: of gradient norms, by group. clean_steps: since the last snapshot. lr_factor: halved by each rewind."""

    averages: dict[str, NormAverage] = field(default_factory=dict)
    bad_steps_in_a_row: int = 0
    clean_steps: int = 0
    rewinds: int = 0
    lr_factor: float = 1.0
    rate: DynamicRate = field(default_factory=DynamicRate)
    loss_scale: LossScale = field(default_factory=LossScale)
    clamp: ClampSwitch = field(default_factory=ClampSwitch)

    def feed(self, statistics: StepStatistics, decision: Decision) -> None:
        """After a step: averages see the norms of steps that were taken, and of groups that had gradients."""
        self.bad_steps_in_a_row = self.bad_steps_in_a_row + 1 if decision.bad else 0
        if decision.skip:
            return
        self.clean_steps += not decision.bad
        for name, norm in [*statistics.gradients.items(), (ALL, decision.grad_norm)]:
            if norm > 0:
                self.averages.setdefault(name, NormAverage()).feed(norm)

    def next_act(self, statistics: StepStatistics, *, max_bad_steps: int, max_rewinds: int) -> Act:
        """Bad steps in a row, or weights that are not finite, mean that the trouble is in the weights."""
        if not statistics.broken_weights and self.bad_steps_in_a_row < max_bad_steps:
            return "go on"
        return "rewind" if self.rewinds < max_rewinds else "stop"

    def rewound(self) -> None:
        self.rewinds += 1
        self.lr_factor *= REWIND_RATE
        self.bad_steps_in_a_row = self.clean_steps = 0

    @property
    def snapshot_due(self) -> bool:
        return self.clean_steps >= SNAPSHOT_STEPS
