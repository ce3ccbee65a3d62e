"""An evaluation's numbers as Markdown."""

from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """result: what `evaluate_model` returns, with `checkpoint` and `eval_file`."""
    counts = result["counts"]
    lines = [
        f"# {result['checkpoint']} on {result['eval_file']}",
        "",
        f"{counts['dialogues']} dialogues, {counts['turns']} answers, {result['seconds']:.1f} s",
        "",
        "| | exactly right | with swapped audio | majority answer |",
        "|---|---|---|---|",
        _row("all answers", result["turns"], result["turns_swapped"], result["majority"]),
    ]
    for kind, scores in result["kinds"].items() if len(result["kinds"]) > 1 else ():
        lines.append(_row(f"{kind} ({scores['n']})", scores["turns"], scores["swapped"], scores["majority"]))
    lines += [_row("whole dialogues", result["dialogues"], None, None), ""]
    lines.append(
        f"WER {_percent(result['wer'])}, CER {_percent(result['cer'])}, loss {result['loss']:.4f} nats a token"
    )
    if result["listening_gain"] is not None:
        lines += [
            "",
            f"Listening gain {result['listening_gain']:.4f} nats a token: answers cost {result['loss_swapped']:.4f} "
            f"after swapped audio, {result['loss_unswapped']:.4f} after their own. {_swap_note(counts)}",
        ]
    if result["rejected"]:
        first = result["rejected"][0]
        lines += ["", f"{len(result['rejected'])} dialogues left out, the first: {first['id']}: {first['reason']}"]
    return "\n".join(lines)


def _swap_note(counts: dict[str, int]) -> str:
    note = f"{counts['swapped']} answers were asked for again with another dialogue's clips"
    note += f", {counts['swapped_same_question']} of them after the same question"
    if counts["without_audio"]:
        note += f"; {counts['without_audio']} follow no audio"
    if counts["not_swapped"]:
        note += f"; for {counts['not_swapped']} no clips were found that change the answer"
    return note + "."


def _row(name: str, *shares: float | None) -> str:
    return f"| {name.replace('|', chr(92) + '|')} | " + " | ".join(map(_percent, shares)) + " |"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
