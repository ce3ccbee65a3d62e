"""The guards' memory between steps. Plain Python; all of it is saved with the run.

`GuardState` holds the averages of gradient norms and the counts of bad steps and rewinds; `DynamicRate`, `ClampSwitch`
and `LossScale` are its parts, each with its own rule.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from qwhisper.guards.decide import Decision, NormAverage, StepStatistics
from qwhisper.typed_json import ADDED_LATER

RATE_WINDOW, RATE_CALM = 20, 60
RATE_DOWN, RATE_UP, RATE_LEAST = 0.7, 1.1, 0.1
FAST, SLOW = 1 / 20, 1 / 100  # weights of a new loss in the two averages
RISE = 2.5  # twice in 13,500 sound steps
LOSSES_KNOWN = 40  # losses before the two averages mean anything

# The field report's. In a 4-bit copy of Qwen2.5-1.5B, the first q_proj's inputs from words are below it except for 2
# values in 100,000, of up to 18.
CLAMP_BOUND = 8.0
CLAMP_SPIKES = 3  # fewer than the 5 bad steps in a row that rewind
CLAMP_WINDOW = 50  # steps; the norms' average covers as many
CLAMP_CLEAN = 200  # four windows: turning off takes longer than turning on, so that it does not oscillate

LARGEST_SCALE, SMALLEST_SCALE = 2.0**24, 1.0
SHRINK, GROW = 1 / 4, 2.0  # a step runs again at once after an overflow: larger steps down end sooner
GROWTH_STEPS = 500  # steps without overflow before a larger one is tried

SNAPSHOT_STEPS = 50  # clean steps between two snapshots
REWIND_RATE = 0.5  # factor on the learning rate after each rewind
ALL = "all"  # key of the average norm of all groups together: a metric, not a bound

Act = Literal["go on", "rewind", "stop"]


@dataclass
class RecentPeaks:
    """The recent peaks or spikes, for --dynamic_lr and the clamp.

    step: steps that `note` has counted. last_peak: the last of them with a peak. peaks: the recent ones.
    """

    step: int = 0
    last_peak: int = 0
    peaks: list[int] = field(default_factory=list)

    def note(self, peak: bool, window: int) -> None:
        """Add a step; forget peaks older than `window` steps."""
        self.step += 1
        if peak:
            self.last_peak = self.step
            self.peaks.append(self.step)
        self.peaks = [step for step in self.peaks if step > self.step - window]

    @property
    def calm(self) -> int:
        """Steps since the last peak."""
        return self.step - self.last_peak


@dataclass
class DynamicRate(RecentPeaks):
    """`--dynamic_lr`: lowers the learning rate while training is unstable, and raises it again afterwards.

    A step is unstable ("uneasy") if the loss rises, or if the loss does not fall and two of the last RATE_WINDOW steps
    had a peak (a group's gradient norm above its adaptive bound) or were skipped. Such a step multiplies the rate by
    RATE_DOWN, at most once in RATE_WINDOW steps and never below RATE_LEAST. RATE_CALM steps without any multiply it by
    RATE_UP, again after every further RATE_WINDOW, never above 1. Raising takes longer than lowering, so that the rate
    does not oscillate. The loss falls if its average over about 20 steps is below that over about 100; it rises if it
    is above by RISE standard errors. Peaks alone are no criterion: a run that learns well has one in eight steps
    (decide.py).

    factor: on the learning rate. last_change, last_uneasy: steps of the last change and of the last unstable step.
    fast, slow, variance: averages of the losses, of which there were `losses`.
    """

    factor: float = 1.0
    last_change: int = 0
    last_uneasy: int = 0
    losses: int = 0
    fast: float = 0.0
    slow: float = 0.0
    variance: float = 0.0

    def observe(self, loss: float, peak: bool) -> bool:
        """Add a step; return whether the factor has changed. A loss that is not finite enters no average."""
        if math.isfinite(loss):
            self._feed(loss)
        self.note(peak, RATE_WINDOW)
        if self._uneasy():
            self.last_uneasy = self.step
        if self.step - self.last_change < RATE_WINDOW:
            return False
        if self.last_uneasy == self.step and self.factor > RATE_LEAST:
            return self._change(RATE_DOWN)
        if self.step - self.last_uneasy >= RATE_CALM and self.factor < 1.0:
            return self._change(RATE_UP)
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
        return self.losses >= LOSSES_KNOWN and (rises or (len(self.peaks) >= 2 and not falls))

    def _change(self, by: float) -> bool:
        self.factor = min(1.0, max(RATE_LEAST, self.factor * by))
        self.last_change = self.step
        return True


@dataclass
class ClampSwitch(RecentPeaks):
    """Turns `--activation_clamp auto` on and off. It reacts to spikes (decide.py defines them) and skipped steps, which
    sound runs don't have, and ignores ordinary peaks, which hard samples cause.

    On after CLAMP_SPIKES of these within CLAMP_WINDOW steps, off after CLAMP_CLEAN steps without any.

    clamped: activations clamped since it was last turned on; the session adds them. told: how many of them events have
    reported (checkpoints use this name).
    """

    on: bool = False
    clamped: int = 0
    told: int = field(default=0, metadata=ADDED_LATER)

    def observe(self, spiked: bool) -> Literal["on", "off"] | None:
        """Add a step; return the new state of the clamp, or None if it does not change."""
        self.note(spiked, CLAMP_WINDOW)
        if not self.on and len(self.peaks) >= CLAMP_SPIKES:
            self.on, self.clamped, self.told = True, 0, 0
            return "on"
        if self.on and self.calm >= CLAMP_CLEAN:
            self.on = False
            return "off"
        return None


@dataclass
class LossScale:
    """The factor that keeps fp16 gradients out of underflow (Micikevicius et al., 2018, section 3.2).

    Only fp16 runs use it. clean: steps since the last change."""

    scale: float = 2.0**15
    clean: int = 0

    def shrink(self) -> bool:
        """Call after an overflow. Returns False if the scale is already the smallest: then the cause is no overflow."""
        if self.scale <= SMALLEST_SCALE:
            return False
        self.scale, self.clean = max(SMALLEST_SCALE, self.scale * SHRINK), 0
        return True

    def step_taken(self) -> None:
        self.clean += 1
        if self.clean >= GROWTH_STEPS:
            self.scale, self.clean = min(LARGEST_SCALE, self.scale * GROW), 0


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
        """Call after a step. If it was taken, adds the norms of groups with gradients to the averages."""
        self.bad_steps_in_a_row = self.bad_steps_in_a_row + 1 if decision.bad else 0
        if decision.skip:
            return
        self.clean_steps += not decision.bad
        for name, norm in [*statistics.gradients.items(), (ALL, decision.grad_norm)]:
            if norm > 0:
                self.averages.setdefault(name, NormAverage()).feed(norm)

    def next_act(self, statistics: StepStatistics, *, max_bad_steps: int, max_rewinds: int) -> Act:
        """What to do after a step. Several bad steps in a row, or a weight that is not finite, mean damaged weights."""
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
