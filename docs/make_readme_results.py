"""Writes what README.md and README.zh-CN.md show first, between their marks, and draws demo_loss.png.

    python docs/make_readme_results.py

Conversation, accuracy and loss curve are of one recorded demo, the last line of benchmarks/results/demo.jsonl; the
table of real models is made from benchmarks/results/real_lm.jsonl as docs/learning.md does it.
"""

import json
from collections.abc import Callable
from pathlib import Path

from make_learning_tables import compared, scores
from marked import table, write_in_each_language

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "demo.jsonl"
PLOT = DOCS / "demo_loss.png"
PAGES = {"en": DOCS.parent / "README.md", "zh": DOCS.parent / "README.zh-CN.md"}
SMOOTHED = 20  # steps that a point of the mean covers

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "user": "user:     ",
        "assistant": "qwhisper: ",
        "accuracy_head": "question (answers) | untrained | trained | other clips put in | always the commonest answer",
        "number": "which number was said",
        "bigger": "is it bigger than five",
        "sum": "the sum of two numbers in one turn",
        "earlier_sum": "the sum with the number of the turn before",
        "earliest": "the number of the first turn, two turns later",
        "all": "**all questions**",
        "counted": "{} ({})",
        "percent": "{:.1f} %",
        "real_models_head": "recipe | names a digit | names the last of two | retention",
        "lora": "LoRA on the two questions alone",
        "recommended": "`keep-thinking`, `--projector_dropout 0.5`",
        "percent_of": "{} %",
    },
    "zh": {
        "user": "用户：     ",
        "assistant": "qwhisper： ",
        "accuracy_head": "问题（回答数） | 训练前 | 训练后 | 换成别的音频 | 总答最常见的答案",
        "number": "说的是哪个数",
        "bigger": "是否大于五",
        "sum": "同一轮里两个数之和",
        "earlier_sum": "与上一轮的数之和",
        "earliest": "隔两轮再问第一轮的数",
        "all": "**全部问题**",
        "counted": "{}（{}）",
        "percent": "{:.1f}%",
        "real_models_head": "配方 | 说出数字 | 说出两个中的后一个 | 保持率",
        "lora": "只在这两类问题上训练 LoRA",
        "recommended": "`keep-thinking`，`--projector_dropout 0.5`",
        "percent_of": "{}%",
    },
}
SHOWN = ("number", "bigger", "sum", "earlier_sum", "earliest")
COLUMNS = ("turns_before", "turns", "turns_swapped", "majority")


def recorded() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8").splitlines()[-1])


def conversation(words: dict[str, str]) -> str:
    """A block of code; the speaker sign stands for a clip, with what is said in it."""
    lines = []
    for turn in recorded()["conversation"]:
        heard = f"🔊 “{turn['heard']}”  " if turn["heard"] else ""
        lines += [words["user"] + heard + turn["asked"], words["assistant"] + turn["answered"]]
    return "\n".join(["```text", *lines, "```"])


def accuracy(words: dict[str, str]) -> str:
    result = recorded()
    every = {"all": result | {"n": sum(scores["n"] for scores in result["kinds"].values())}}
    rows = []
    for name, found in ({kind: result["kinds"][kind] for kind in SHOWN} | every).items():
        rows.append(
            [
                words["counted"].format(words[name], found["n"]),
                *(words["percent"].format(100 * found[c]) for c in COLUMNS),
            ]
        )
    return table(words["accuracy_head"], rows)


def real_models(words: dict[str, str]) -> str:
    rows = []
    for recipe in ("lora", "recommended"):
        clip, last, retention = scores(compared(recipe), ("clip", "last", "retention"))
        rows.append([words[recipe], words["percent_of"].format(clip), words["percent_of"].format(last), retention])
    return table(words["real_models_head"], rows)


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    losses = np.array(recorded()["losses"])
    steps = np.arange(1, len(losses) + 1)
    mean = np.convolve(losses, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps[SMOOTHED - 1 :], mean, color="tab:blue", label=f"mean of {SMOOTHED} steps")
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token", xlim=(0, len(losses)), ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(PLOT, dpi=100, metadata={"Software": None})
    plt.close(figure)


TABLES: dict[str, Callable[[dict[str, str]], str]] = {
    "conversation": conversation,
    "accuracy": accuracy,
    "real_models": real_models,
}


def main() -> None:
    draw()
    write_in_each_language(PAGES, TABLES, WORDS)


if __name__ == "__main__":
    main()
