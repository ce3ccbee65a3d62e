"""When `--activation_clamp auto` is on. Plain Python; its fields are saved with the run.

It answers spikes (averages.py says what one is) and steps that had to be skipped, which sound runs don't have. Ordinary
peaks mean nothing to it: hard samples make them.
"""

from dataclasses import dataclass, field
from typing import Literal

from qwhisper.guards.peaks import RecentPeaks
from qwhisper.typed_json import ADDED_LATER

# The field report's. In a 4-bit copy of Qwen2.5-1.5B what the first q_proj reads of a word stays below it but for 2
# values in 100,000, up to 18.
BOUND = 8.0
SPIKES, WINDOW = 3, 50  # fewer than the 5 bad steps in a row that rewind; as long as the norms' average remembers
CLEAN = 200  # four windows: going off takes longer than coming on, so that it does not swing


@dataclass
class ClampSwitch(RecentPeaks):
    """On after SPIKES spikes within WINDOW steps, off after CLEAN steps without any.

    clamped: activations that were clamped since it last went on; whoever counts them adds them. told: how many of
    them events have reported.
    """

    on: bool = False
    clamped: int = 0
    told: int = field(default=0, metadata=ADDED_LATER)

    def observe(self, spiked: bool) -> Literal["on", "off"] | None:
        """One step; what the clamp has to be from now on, or None where it stays as it is."""
        self.note(spiked, WINDOW)
        if not self.on and len(self.peaks) >= SPIKES:
            self.on, self.clamped, self.told = True, 0, 0
            return "on"
        if self.on and self.calm >= CLEAN:
            self.on = False
            return "off"
        return None
