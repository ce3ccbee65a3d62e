"""Compares the lines of results/quality.jsonl: each variant with the plain run of the same task and seed.

    python benchmarks/quality_report.py

Two intervals, both of 95 %. Over the seeds: Student's t of the paired differences, wide because there are three. Over
the questions: a bootstrap that draws the questions again and keeps the trained models; it says how well these models
are known, not how another seed would do.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
TASKS = ("digits", "real_lm")
VARIANTS = ("plain", "captured", "cached", "fp8", "nf4")
EVAL_SPEAKERS = ("jackson", "george", "lucas", "nicolas")  # never heard with seed 0, 1, 2, 3
MOST_POINTS, MOST_PERCENT = 1.5, 1.0  # lower accuracy, higher loss
DRAWS = 10_000
# Student's t, 97.5 %, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


@dataclass(frozen=True)
class Comparison:
    """A variant with its plain runs, over the seeds that both have.

    accuracy, plain_accuracy: in percent. points: accuracy less plain accuracy, over the seeds; by_questions: the same
    over the questions. loss_percent: loss divided by plain loss, less one, in percent.
    """

    task: str
    variant: str
    seeds: int
    plain_accuracy: float
    accuracy: float
    points: Interval
    by_questions: Interval
    plain_loss: float
    loss: float
    loss_percent: Interval

    @property
    def holds(self) -> bool:
        """Whether the means keep the bounds: no more than MOST_POINTS lower, no more than MOST_PERCENT higher."""
        return self.points.mean >= -MOST_POINTS and self.loss_percent.mean <= MOST_PERCENT


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean and Student's interval; without bounds for a single value."""
    middle = mean(values)
    if len(values) < 2:
        return Interval(middle, float("-inf"), float("inf"))
    half = T[len(values) - 1] * stdev(values) / len(values) ** 0.5
    return Interval(middle, middle - half, middle + half)


def over_questions(pairs: Sequence[tuple[str, str]]) -> Interval:
    """Difference of accuracy in points, mean over the seeds; its interval when the questions of each are drawn again.

    pairs: of each seed what was right without and with the variant, one 0 or 1 a question.
    """
    generator, means, drawn = np.random.default_rng(0), [], np.zeros(DRAWS)
    for pair in pairs:
        differences = [int(b) - int(a) for a, b in zip(*pair, strict=True)]
        values, counts = np.unique(differences, return_counts=True)
        # To draw questions with replacement is to draw how many of each difference there are.
        drawn += generator.multinomial(len(differences), counts / len(differences), DRAWS) @ values / len(differences)
        means.append(mean(differences))
    low, high = np.quantile(drawn / len(pairs), (0.025, 0.975))
    return Interval(*(100 * float(value) for value in (mean(means), low, high)))


def compare(plain: Sequence[dict], with_variant: Sequence[dict]) -> Comparison:
    """Lines of the same task and of the same seeds, in the same order."""
    pairs = list(zip(plain, with_variant, strict=True))
    return Comparison(
        task=plain[0]["task"],
        variant=with_variant[0]["variant"],
        seeds=len(pairs),
        plain_accuracy=100 * mean(a["accuracy"] for a, _ in pairs),
        accuracy=100 * mean(b["accuracy"] for _, b in pairs),
        points=over_seeds([100 * (b["accuracy"] - a["accuracy"]) for a, b in pairs]),
        by_questions=over_questions([(a["right"], b["right"]) for a, b in pairs]),
        plain_loss=mean(a["loss"] for a, _ in pairs),
        loss=mean(b["loss"] for _, b in pairs),
        loss_percent=over_seeds([100 * (b["loss"] / a["loss"] - 1) for a, b in pairs]),
    )


def comparisons(lines: Sequence[dict]) -> list[Comparison]:
    """Each task and variant, from the latest line of each seed; pairs with the same steps and questions."""
    latest = {(line["task"], line["variant"], line["seed"]): line for line in lines}
    found = []
    for task in TASKS:
        for variant in VARIANTS[1:]:
            pairs = [
                (latest[task, "plain", seed], latest[task, variant, seed])
                for seed in range(len(EVAL_SPEAKERS))
                if (task, "plain", seed) in latest and (task, variant, seed) in latest
            ]
            pairs = [(a, b) for a, b in pairs if a["steps"] == b["steps"] and len(a["right"]) == len(b["right"])]
            if pairs:
                found.append(compare(*zip(*pairs, strict=True)))
    return found


def rows(found: Sequence[Comparison]) -> list[list[str]]:
    return [
        [
            one.task, one.variant, str(one.seeds), f"{one.plain_accuracy:.1f}", f"{one.accuracy:.1f}",
            str(one.points), str(one.by_questions), f"{one.plain_loss:.4f}", f"{one.loss:.4f}", str(one.loss_percent),
            "yes" if one.holds else "no",
        ]
        for one in found
    ]  # fmt: skip


HEAD = (
    "task | variant | seeds | plain, % right | % right | points, over seeds | points, over questions | plain loss | "
    "loss | loss, %, over seeds | holds"
)


def read(file: Path = RESULTS) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def main() -> None:
    print(HEAD)
    for row in rows(comparisons(read())):
        print(" | ".join(row))


if __name__ == "__main__":
    main()
