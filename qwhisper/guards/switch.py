"""When `--activation_clamp auto` is on. Plain Python; its fields are saved with the run."""

from dataclasses import dataclass, field
from typing import Literal

# The field report's. In a 4-bit copy of Qwen2.5-1.5B what the first q_proj reads of a word stays below it but for 2
# values in 100,000, up to 18.
BOUND = 8.0
SPIKES, WINDOW = 3, 50  # fewer than the 5 bad steps in a row that rewind; as long as the norms' average remembers
CLEAN = 200  # four windows: going off takes longer than coming on, so that it does not swing


@dataclass
class ClampSwitch:
    """`auto`: on after SPIKES spikes within WINDOW steps, off after CLEAN steps without any. Plain Python.

    spikes: the steps with one in the last WINDOW steps; steps are counted by `observe`. Saved with the run by
    `dataclasses.asdict`, and read back by `ClampSwitch(**values)`.
    """

    on: bool = False
    step: int = 0
    last_spike: int = 0
    spikes: list[int] = field(default_factory=list)

    def observe(self, spiked: bool) -> Literal["on", "off"] | None:
        """One step; what the clamp has to be from now on, or None where it stays as it is."""
        self.step += 1
        if spiked:
            self.last_spike = self.step
            self.spikes.append(self.step)
        self.spikes = [step for step in self.spikes if step > self.step - WINDOW]
        if not self.on and len(self.spikes) >= SPIKES:
            self.on = True
            return "on"
        if self.on and self.step - self.last_spike >= CLEAN:
            self.on = False
            return "off"
        return None
