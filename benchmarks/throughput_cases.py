"""The cases of throughput.py: which model and recipe, with which flags, on which dialogues, beside which plain loop."""

from dataclasses import dataclass

MOST_GIB = 30.0  # reserved, of a card of 32 GB


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of `qwhisper train`.

    size: of real_shapes.SIZES. batch, accumulate: their product is the number of samples of a step. plain: (samples of
    a batch, accumulation, recompute) of the plain loop. steps: those that are timed, and the first third, which is not.
    flags: of `train`; {features} stands for a folder in the output folder. most_gib: the memory that may be reserved.
    nf4_base: the base on the disk is in 4 bits already. resumed: the figures are of a resumed run, beside those before
    it. longest_s, most_turns: of the dialogues.
    """

    size: str
    recipe: str
    batch: int = 128
    accumulate: int = 1
    plain: tuple[int, int, bool] | None = None
    steps: int = 15
    flags: tuple[str, ...] = ()
    most_gib: float = MOST_GIB
    nf4_base: bool = False
    resumed: bool = False
    longest_s: float = 30.0
    most_turns: int = 1

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.batch * self.accumulate

    @property
    def caches_features(self) -> bool:
        return "--feature_cache" in self.flags


SMALL, STABLE, NF4 = "qwen3-0.6b-32gb", "qwen3-8b-32gb", "qwen3-8b-4bit-32gb"
CACHED = ("--feature_cache", "{features}")
FP8 = ("--load_in_fp8",)

CASES = {
    "tiny": Case(size="tiny", recipe=SMALL, batch=4, plain=(2, 2, False), steps=4),
    "0.6b": Case(size="0.6b", recipe=SMALL, plain=(16, 8, False)),
    "0.6b-cached": Case(size="0.6b", recipe=SMALL, flags=CACHED),
    "0.6b-1x4": Case(size="0.6b", recipe=STABLE, batch=1, accumulate=4, plain=(1, 4, False), steps=120),
    "0.6b-long": Case(size="0.6b", recipe=SMALL, longest_s=60.0),
    "0.6b-turns": Case(size="0.6b", recipe=SMALL, longest_s=60.0, most_turns=4),
    "0.6b-resume": Case(size="0.6b", recipe=SMALL, resumed=True),
    "0.6b-distill": Case(size="0.6b", recipe="keep-thinking"),
    "0.6b-no-distill": Case(size="0.6b", recipe="keep-thinking", flags=("--distill_weight", "0")),
    "4b": Case(size="4b", recipe="qwen3-4b-32gb", steps=9),
    "8b-bf16": Case(size="8b", recipe=STABLE, plain=(8, 16, True), steps=6),
    "8b-bf16-1x4": Case(size="8b", recipe=STABLE, batch=1, accumulate=4, plain=(1, 4, True), steps=90),
    "8b-fp8": Case(size="8b", recipe=STABLE, steps=9, flags=FP8),
    "8b-fp8-cached": Case(size="8b", recipe=STABLE, steps=9, flags=FP8 + CACHED),
    "8b-distill": Case(size="8b", recipe="keep-thinking", steps=6),
    "8b-no-distill": Case(size="8b", recipe="keep-thinking", steps=6, flags=("--distill_weight", "0")),
    "8b-nf4": Case(size="8b", recipe=NF4, steps=6, most_gib=12.0),
    "14b-nf4": Case(size="14b", recipe=NF4, steps=4, most_gib=20.0, nf4_base=True),
    "32b-nf4": Case(size="32b", recipe=NF4, steps=3, nf4_base=True),
}
