"""`--dynamic_lr`: a learning rate that steps back from peaks and returns when they are over. Plain Python.

The rule: two steps with a peak (a group's gradient norm above its adaptive bound) or a skip within WINDOW steps bring
the rate down by DOWN, never below LEAST, and at most once in WINDOW steps. CALM steps without any bring it up by UP,
never above 1, and again after every further WINDOW. Going up takes longer than going down, so that it does not swing.
"""

from dataclasses import dataclass, field

WINDOW, CALM = 20, 60
DOWN, UP, LEAST = 0.7, 1.1, 0.1


@dataclass
class DynamicRate:
    """factor: on the learning rate. peaks: steps with one in the last WINDOW steps. Steps are counted by `observe`."""

    factor: float = 1.0
    step: int = 0
    last_peak: int = 0
    last_change: int = 0
    peaks: list[int] = field(default_factory=list)

    def observe(self, peak: bool) -> bool:
        """One step; True where the factor has changed."""
        self.step += 1
        if peak:
            self.last_peak = self.step
            self.peaks.append(self.step)
        self.peaks = [step for step in self.peaks if step > self.step - WINDOW]
        since_change = self.step - self.last_change
        if len(self.peaks) >= 2 and since_change >= WINDOW and self.factor > LEAST:
            return self._change(DOWN)
        if self.step - self.last_peak >= CALM and since_change >= WINDOW and self.factor < 1.0:
            return self._change(UP)
        return False

    def _change(self, by: float) -> bool:
        self.factor = min(1.0, max(LEAST, self.factor * by))
        self.last_change = self.step
        self.peaks = []
        return True
