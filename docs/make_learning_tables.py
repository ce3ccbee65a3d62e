"""Writes the tables of docs/learning.md and docs/learning.zh.md, between their marks.

    python docs/make_learning_tables.py

The figures come from benchmarks/results/real_lm.jsonl: of every recipe, speaker, seed and numbers the latest line with
a retention. A row is the mean over COMPARED; the last two tables have the recommended recipe's every run.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

from marked import table, write_in_each_language

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "real_lm.jsonl"
PAGES = {"en": DOCS / "learning.md", "zh": DOCS / "learning.zh.md"}
CAUTIONS = ("stable", "stable_high_rate", "stable_no_early_factor", "stable_no_freeze", "stable_full_init")
RECIPES = (
    "stable", "lora", "low_lora", "few_targets", "projector", "two_stage", "rehearsal", "distill", "projector_distill",
    "two_stage_distill", "instructions", "distill_instructions", "projector_instructions",
    "projector_distill_instructions", "two_stage_recommended", "recommended",
)  # fmt: skip
COMPARED = {"jackson": 0, "george": 1, "lucas": 2}  # who is never heard, and the seed
NUMBERS = ("steps", "copies", "synthesised")
USUAL = (300, 4, 1500)
KINDS = ("clip", "last", "sum", "next", "double", "larger", "over_five", "spanish", "capitals", "both")
BY_KIND = ("lora", "stable", "projector", "projector_instructions", "recommended")

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "recipes_head": "recipe | runs | clip | last | sum | retention | text shift | swapped",
        "cautions_head": "recipe | runs | steps until the held-out loss is 0.2 | clip | last | retention | text shift",
        "kinds_head": "recipe | {kinds}",
        "speakers_head": "never heard | seed | clip | last | sum | retention | text shift | swapped",
        "numbers_head": "never heard | steps | altered copies | synthesised | clip | last | sum | retention | swapped",
        "and": ", ",
        "text": "the text model, reading the words",
        "more": "more than {}",
    },
    "zh": {
        "recipes_head": "配方 | 次数 | clip | last | sum | 保持率 | 文本偏移 | 换音频",
        "cautions_head": "配方 | 次数 | 留出 loss 降到 0.2 的步数 | clip | last | 保持率 | 文本偏移",
        "kinds_head": "配方 | {kinds}",
        "speakers_head": "未听过的人 | 种子 | clip | last | sum | 保持率 | 文本偏移 | 换音频",
        "numbers_head": "未听过的人 | 步数 | 变化副本 | 合成片段 | clip | last | sum | 保持率 | 换音频",
        "and": "、",
        "text": "文本模型读文字",
        "more": "超过 {}",
    },
}


def numbers(line: dict) -> tuple[int, ...]:
    return tuple(line[name] for name in NUMBERS)


def results() -> dict[str, list[dict]]:
    """The latest line of each speaker, seed and numbers, by recipe."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    measured = [line for line in lines if line.get("retention") is not None]
    latest = {(line["recipe"], line["eval_speaker"], line["seed"], numbers(line)): line for line in measured}
    found: dict[str, list[dict]] = {}
    for (recipe, *_), line in sorted(latest.items()):
        found.setdefault(recipe, []).append(line)
    return found


def compared(recipe: str) -> list[dict]:
    """The lines that a row is the mean of."""
    lines = [line for line in results().get(recipe, []) if numbers(line) == USUAL]
    return [line for line in lines if COMPARED.get(line["eval_speaker"]) == line["seed"]]


def percent(values: Iterable[float]) -> str:
    return f"{100 * mean(values):.0f}"


def scores(lines: list[dict], names: Iterable[str]) -> list[str]:
    """Shares in percent; the retention and the shift as they are, the latter only by today's definition."""
    plain = {"retention": ".2f", "text_shift": ".3f"}
    values = {name: [line[name] for line in lines] for name in names}
    if "text_shift" in values:
        values["text_shift"] = [line["text_shift"] for line in lines if "text_shift_of" not in line]
    return [("–" if not v else format(mean(v), plain[n])) if n in plain else percent(v) for n, v in values.items()]


def recipes_table(words: dict[str, str]) -> str:
    names = ("clip", "last", "sum", "retention", "text_shift", "swapped")
    rows = [[f"`{r}`", len(lines), *scores(lines, names)] for r in RECIPES if (lines := compared(r))]
    return table(words["recipes_head"], rows)


def cautions_table(words: dict[str, str]) -> str:
    rows = []
    for recipe in CAUTIONS:
        if lines := compared(recipe):
            reached = [line["steps_to_loss_0.2"] for line in lines]
            steps = [words["more"].format(lines[0]["steps"]) if step is None else str(step) for step in reached]
            kept = scores(lines, ("clip", "last", "retention", "text_shift"))
            rows.append([f"`{recipe}`", len(lines), words["and"].join(steps), *kept])
    return table(words["cautions_head"], rows)


def kinds_table(words: dict[str, str]) -> str:
    every = [line["text_lm"] for recipe in RECIPES for line in compared(recipe)]
    rows = [[words["text"], *(percent(line[kind] for line in every) for kind in KINDS)]]
    rows += [[f"`{recipe}`", *scores(lines, KINDS)] for recipe in BY_KIND if (lines := compared(recipe))]
    return table(words["kinds_head"].format(kinds=" | ".join(KINDS)), rows)


def speakers_table(words: dict[str, str]) -> str:
    names = ("clip", "last", "sum", "retention", "text_shift", "swapped")
    lines = [line for line in results()["recommended"] if numbers(line) == USUAL]
    return table(
        words["speakers_head"], [[line["eval_speaker"], line["seed"], *scores([line], names)] for line in lines]
    )


def numbers_table(words: dict[str, str]) -> str:
    """The runs of speakers and seeds that were also tried with other numbers."""
    names = ("clip", "last", "sum", "retention", "swapped")
    lines = results()["recommended"]
    tried = {(line["eval_speaker"], line["seed"]) for line in lines if numbers(line) != USUAL}
    shown = [line for line in lines if (line["eval_speaker"], line["seed"]) in tried]
    rows = [[line["eval_speaker"], *numbers(line), *scores([line], names)] for line in shown]
    return table(words["numbers_head"], rows)


TABLES: dict[str, Callable[[dict[str, str]], str]] = {
    "recipes": recipes_table,
    "cautions": cautions_table,
    "kinds": kinds_table,
    "speakers": speakers_table,
    "numbers": numbers_table,
}


def main() -> None:
    write_in_each_language(PAGES, TABLES, WORDS)


if __name__ == "__main__":
    main()
