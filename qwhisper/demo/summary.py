"""Results of a demo: demo.json, loss.png, and the lines printed at its end."""

from pathlib import Path
from typing import Any

from qwhisper.data.dialogue import read_dialogues
from qwhisper.demo.prepare import DemoPaths
from qwhisper.report.events import read_jsonl


def headline(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def summary(
    seed: int, before: dict, after: dict, swapped: dict, paths: DemoPaths, commands: list[str]
) -> dict[str, Any]:
    """demo.json: shares from 0 to 1.

    turns_swapped: the original's answers that the model still gives although the swapped clips make each of them wrong.
    """
    kinds = {
        kind: {
            "n": scores["n"],
            "turns_before": before["kinds"][kind]["turns"],
            "turns": scores["turns"],
            "turns_swapped": swapped["kinds"][kind]["turns"],
            "majority": scores["majority"],
        }
        for kind, scores in after["kinds"].items()
    }
    return {
        "seed": seed,
        "turns_before": before["turns"],
        "turns": after["turns"],
        "turns_swapped": swapped["turns"],
        "dialogues": after["dialogues"],
        "majority": after["majority"],
        "loss_before": before["loss"],
        "loss": after["loss"],
        "kinds": kinds,
        "bases": paths.report,
        "dialogue": example(after, paths),
        "commands": commands,
    }


def example(after: dict, paths: DemoPaths) -> list[dict[str, str]]:
    """The first held-out dialogue of two turns: what was said and asked, and what the model answered."""
    answers = {(answer["id"], answer["turn"]): answer["answer"] for answer in after["answers"]}
    dialogue = next(
        d for d in read_dialogues(paths.eval_file) if sum(message.role == "assistant" for message in d.messages) == 2
    )
    lines, turn = [], 0
    for message in dialogue.messages:
        if message.role == "assistant":
            turn += 1
            lines.append({"role": "assistant", "text": answers[dialogue.id, turn]})
        else:
            heard = "".join(f"[{clip.transcript}] " for clip in message.clips)
            lines.append({"role": message.role, "text": heard + message.text})
    return lines


def plot_loss(folder: Path) -> None:
    """loss.png: every step's loss and its mean over 20 steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    losses = np.array([record["loss"] for record in read_jsonl(folder / "run/metrics.jsonl") if "loss" in record])
    smooth = np.convolve(losses, np.ones(20) / 20, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(np.arange(1, len(losses) + 1), losses, color="0.8", linewidth=0.8, label="step")
    axes.plot(np.arange(20, len(losses) + 1), smooth, label="mean of 20 steps")
    axes.set(xlabel="optimizer step", ylabel="nats a supervised token", title="Training loss", ylim=(0, None))
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)
    plt.close(figure)


def report(result: dict[str, Any], folder: Path) -> None:
    headline("What it learned")
    print(f"{'question':<16}{'answers':>8}{'before':>9}{'after':>9}{'swapped':>9}{'majority':>10}")
    rows = {**result["kinds"], "all": result | {"n": sum(scores["n"] for scores in result["kinds"].values())}}
    for kind, scores in rows.items():
        shares = [scores[name] for name in ("turns_before", "turns", "turns_swapped", "majority")]
        print(f"{kind:<16}{scores['n']:>8}{shares[0]:>9.1%}{shares[1]:>9.1%}{shares[2]:>9.1%}{shares[3]:>10.1%}")
    print("swapped: reference answers still given when other clips are put in, which makes every one of them wrong")
    headline("A dialogue with a voice it never heard")
    for line in result["dialogue"]:
        print(f"{line['role']:>10}: {line['text']}")
    headline("The commands, to copy")
    print("\n".join(result["commands"]))
    print(
        f"\n{result['seconds']:.0f} s in all. {folder / 'demo.json'}, {folder / 'loss.png'}; "
        f"the trained model is {folder / 'run'}"
    )
