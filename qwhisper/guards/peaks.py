"""The peaks or spikes of the last steps, for --dynamic_lr and the clamp. Plain Python; saved with the run."""

from dataclasses import dataclass, field


@dataclass
class RecentPeaks:
    """step: steps that `note` has counted. last_peak: the last of them with a peak. peaks: those lately."""

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
