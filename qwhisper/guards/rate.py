"""`--dynamic_lr`: a learning rate that steps back from peaks and returns when they are over. Plain Python.

The rule: two steps with a peak (a group's gradient norm above its adaptive bound) or a skip within WINDOW steps bring
the rate down by DOWN, never below LEAST, and at most once in WINDOW steps. CALM steps without any bring it up by UP,
never above 1, and again after every further WINDOW. Going up takes longer than going down, so that it does not swing.
"""

from dataclasses import dataclass

from qwhisper.guards.peaks import RecentPeaks

WINDOW, CALM = 20, 60
DOWN, UP, LEAST = 0.7, 1.1, 0.1


@dataclass
class DynamicRate(RecentPeaks):
    """factor: on the learning rate. last_change: the step in which it last changed."""

    factor: float = 1.0
    last_change: int = 0

    def observe(self, peak: bool) -> bool:
        """One step; True where the factor has changed."""
        self.note(peak, WINDOW)
        since_change = self.step - self.last_change
        if len(self.peaks) >= 2 and since_change >= WINDOW and self.factor > LEAST:
            return self._change(DOWN)
        if self.calm >= CALM and since_change >= WINDOW and self.factor < 1.0:
            return self._change(UP)
        return False

    def _change(self, by: float) -> bool:
        self.factor = min(1.0, max(LEAST, self.factor * by))
        self.last_change = self.step
        self.peaks = []
        return True
