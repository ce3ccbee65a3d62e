"""The factor that keeps fp16 gradients out of underflow (Micikevicius et al., 2018, section 3.2). Plain Python."""

from dataclasses import dataclass

LARGEST, SMALLEST = 2.0**24, 1.0
SHRINK, GROW = 1 / 4, 2.0  # a step is run again at once after an overflow: larger steps down find their place sooner
GROWTH_STEPS = 500  # steps without overflow before it is tried larger


@dataclass
class LossScale:
    """Only fp16 runs look at it. clean: steps since the last change."""

    scale: float = 2.0**15
    clean: int = 0

    def shrink(self) -> bool:
        """After an overflow. False where it is as small as it may be: then it was no overflow."""
        if self.scale <= SMALLEST:
            return False
        self.scale, self.clean = max(SMALLEST, self.scale * SHRINK), 0
        return True

    def step_taken(self) -> None:
        self.clean += 1
        if self.clean >= GROWTH_STEPS:
            self.scale, self.clean = min(LARGEST, self.scale * GROW), 0
