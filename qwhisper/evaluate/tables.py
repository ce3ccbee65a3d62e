"""An evaluation's numbers as Markdown."""

from qwhisper.evaluate.evaluation import Evaluation
from qwhisper.evaluate.forgetting import NO_KIND


def markdown(result: Evaluation, *, checkpoint: str, eval_file: str) -> str:
    """The evaluation as Markdown, under a headline with the checkpoint and the file."""
    counts = result.counts
    lines = [
        f"# {checkpoint} on {eval_file}",
        "",
        f"{counts['dialogues']} dialogues, {counts['turns']} answers, {result.seconds:.1f} s",
        "",
        "| | exactly right | with swapped audio | majority answer | text model, in words |",
        "|---|---|---|---|---|",
        _row("all answers", result.turns, result.turns_swapped, result.majority, result.text_model),
    ]
    for kind, scores in result.kinds.items() if len(result.kinds) > 1 else ():
        shares = (scores[name] for name in ("turns", "swapped", "majority", "text_model"))
        known = result.trained_kinds and kind != NO_KIND
        untrained = ", never trained" if known and kind not in result.trained_kinds else ""
        lines.append(_row(f"{kind} ({scores['n']}{untrained})", *shares))
    lines += [_row("whole dialogues", result.dialogues, None, None, None), ""]
    lines.append(f"WER {_percent(result.wer)}, CER {_percent(result.cer)}, loss {result.loss:.4f} nats a token")
    if result.listening_gain is not None:
        lines += [
            "",
            f"Listening gain {result.listening_gain:.4f} nats a token: answers cost {result.loss_swapped:.4f} "
            f"after swapped audio, {result.loss_unswapped:.4f} after their own. {_swap_note(counts)}",
        ]
    if result.retention is not None:
        lines += [
            "",
            f"Retention {result.retention:.2f}: what is right on speech over what the text model makes of the "
            "words, in kinds of question that were never trained on.",
        ]
    if result.text_shift is not None:
        lines += ["", f"Text shift {result.text_shift:.4f} nats a token from the base, on text alone."]
    for note in result.notes:
        lines += ["", note]
    if result.rejected:
        first = result.rejected[0]
        lines += ["", f"{len(result.rejected)} dialogues left out, the first: {first['id']}: {first['reason']}"]
    return "\n".join(lines)


def _swap_note(counts: dict[str, int]) -> str:
    note = f"{counts['swapped']} answers were asked for again with another dialogue's clips"
    note += f", {counts['swapped_same_question']} of them after the same question"
    if counts["without_audio"]:
        note += f"; {counts['without_audio']} follow no audio"
    if counts["not_swapped"]:
        note += f"; for {counts['not_swapped']} no clips were found that change the answer and fit into the context"
    return note + "."


def _row(name: str, *shares: float | None) -> str:
    return f"| {name.replace('|', chr(92) + '|')} | " + " | ".join(map(_percent, shares)) + " |"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
