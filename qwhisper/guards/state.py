"""What the guards remember from step to step. Plain Python; all of it is saved with the run.

`GuardState` holds the averages of gradient norms and what follows a run of bad steps; `DynamicRate`, `ClampSwitch` and
`LossScale` are its parts, each with its own rule.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from qwhisper.guards.decide import Decision, NormAverage, StepStatistics
from qwhisper.typed_json import ADDED_LATER

RATE_WINDOW, RATE_CALM = 20, 60
RATE_DOWN, RATE_UP, RATE_LEAST = 0.7, 1.1, 0.1
FAST, SLOW = 1 / 20, 1 / 100  # weights of a new loss in the two averages
RISE = 2.5  # in 13,500 sound steps twice
LOSSES_KNOWN = 40  # losses before the two averages say anything

# The field report's. In a 4-bit copy of Qwen2.5-1.5B what the first q_proj reads of a word stays below it but for 2
# values in 100,000, up to 18.
CLAMP_BOUND = 8.0
CLAMP_SPIKES = 3  # fewer than the 5 bad steps in a row that rewind
CLAMP_WINDOW = 50  # as long as the norms' average remembers
CLAMP_CLEAN = 200  # four windows: going off takes longer than coming on, so that it does not swing

LARGEST_SCALE, SMALLEST_SCALE = 2.0**24, 1.0
SHRINK, GROW = 1 / 4, 2.0  # a step is run again at once after an overflow: larger steps down find their place sooner
GROWTH_STEPS = 500  # steps without overflow before it is tried larger

SNAPSHOT_STEPS = 50  # clean steps between two snapshots
REWIND_RATE = 0.5  # factor on the learning rate after each rewind
ALL = "all"  # the average of all groups' norm together: a metric, no bound

Act = Literal["go on", "rewind", "stop"]


@dataclass
class RecentPeaks:
    """The peaks or spikes of the last steps, for --dynamic_lr and the clamp.

    step: steps that `note` has counted. last_peak: the last of them with a peak. peaks: those lately.
    """

    step: int = 0
    last_peak: int = 0
    peaks: list[int] = field(default_factory=list)

    def note(self, peak: bool, window: int) -> None:
        """One more step; peaks further back than `window` steps are forgotten."""
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
    """`--dynamic_lr`: a learning rate that steps back where training is uneasy, and returns when it no longer is.

    Uneasy is a step where the loss does not fall and two of the last RATE_WINDOW steps had a peak (a group's gradient
    norm above its adaptive bound) or were skipped; and one where the loss rises. It brings the rate down by RATE_DOWN,
    never below RATE_LEAST, and at most once in RATE_WINDOW steps. RATE_CALM steps without any bring it up by RATE_UP,
    never above 1, and again after every further RATE_WINDOW. Going up takes longer than going down, so that it does not
    swing. The loss falls where its average over about the last 20 steps is below that over about 100, and rises where
    it is above by RISE standard errors. Peaks alone would not do: a run that learns well has them in one step of eight
    (decide.py).

    factor: on the learning rate. last_change, last_uneasy: the steps in which it last changed, and was last uneasy.
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
    """When `--activation_clamp auto` is on: it answers spikes (decide.py says what one is) and steps that had to be
    skipped, which sound runs don't have. Ordinary peaks mean nothing to it: hard samples make them.

    On after CLAMP_SPIKES spikes within CLAMP_WINDOW steps, off after CLAMP_CLEAN steps without any.

    clamped: activations that were clamped since it was last turned on; the session adds them. told: how many of
    them events have reported; checkpoints know the field by this name.
    """

    on: bool = False
    clamped: int = 0
    told: int = field(default=0, metadata=ADDED_LATER)

    def observe(self, spiked: bool) -> Literal["on", "off"] | None:
        """One step; what the clamp has to be from now on, or None if it stays as it is."""
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

    Only fp16 runs look at it. clean: steps since the last change."""

    scale: float = 2.0**15
    clean: int = 0

    def shrink(self) -> bool:
        """After an overflow. False where it is as small as it may be: then it was no overflow."""
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
