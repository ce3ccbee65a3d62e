"""`qwhisper data check FILE`: every fault of a data set in one pass, before a run would meet the first of them."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwhisper.data.clips import load_clip
from qwhisper.data.collator import ConversationCollator
from qwhisper.data.conversation import Conversation, scan_conversations
from qwhisper.data.template import listening_template
from qwhisper.errors import BadClipError, DataError, UsageError
from qwhisper.frames import SAMPLE_RATE, FrameArithmetic

if TYPE_CHECKING:
    from qwhisper.arguments import DataCheckArguments

MAX_BAD_FRACTION = 0.01  # what training puts up with by default


def main(arguments: "DataCheckArguments") -> int:
    """Print what is in a file and what is wrong with it; 3 if a run on it would end with 3."""
    if arguments.max_length is not None and arguments.text_model is None:
        raise UsageError("--max_length counts tokens: give --text_model as well")
    tokenizer = _load_tokenizer(arguments.text_model, arguments.hub) if arguments.text_model else None
    frames = _load_frames(arguments.audio_model, arguments.hub) if tokenizer is not None else None
    report = check_dataset(
        arguments.file, arguments.data_root, tokenizer=tokenizer, frames=frames, max_length=arguments.max_length
    )
    print("\n".join(report_lines(report)))
    return 0 if report["ok"] else DataError.exit_code


def check_dataset(
    path: str | Path,
    data_root: str | Path | None = None,
    *,
    tokenizer=None,
    frames: FrameArithmetic | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Structure of every line, every clip decoded; with a tokenizer also every dialogue's labels and length.

    Returns counts, `faults` (sentences with file and line), `bad_clips` (the same), and `ok`: no fault, and at most 1 %
    of the dialogues lost to bad clips or without labels. With a tokenizer also `template`, `tokens` and `answer_tokens`
    (least, median, most), `cuts` and `without_labels` (sentences). Raises DataError only if there is no such file.
    """
    conversations, faults = scan_conversations(path, data_root=data_root)
    seconds, bad = _decode_clips(conversations)
    lost = sum(any(clip in bad for clip in conversation.clips) for conversation in conversations)
    report: dict[str, Any] = {
        "file": str(path),
        "dialogues": len(conversations),
        "answers": sum(m.role == "assistant" for c in conversations for m in c.messages),
        "clips": sum(len(c.clips) for c in conversations),
        "audio_seconds": round(seconds, 3),
        "faults": faults,
        "bad_clips": [f"{c.source}: {bad[clip]}" for c in conversations for clip in c.clips if clip in bad],
    }
    if tokenizer is not None:
        sound = [c for c in conversations if not any(clip in bad for clip in c.clips)]
        labels = _check_labels(sound, tokenizer, frames or FrameArithmetic(), max_length)
        lost += len(labels["without_labels"])
        report |= labels
    report["ok"] = not faults and lost <= MAX_BAD_FRACTION * len(conversations)
    return report


def report_lines(report: dict[str, Any]) -> list[str]:
    """A report as the lines that are printed: numbers first, then every fault, then the verdict."""
    lines = [
        f"{report['file']}: {report['dialogues']} dialogues, {report['answers']} answers, {report['clips']} clips, "
        f"{report['audio_seconds'] / 60:.1f} minutes of audio"
    ]
    if "template" in report:
        tokens, answers = report["tokens"], report["answer_tokens"]
        lines.append(f"chat template: {report['template']}")
        lines.append(f"tokens a row: {tokens[0]} to {tokens[2]}, median {tokens[1]}")
        lines.append(f"supervised tokens an answer: {answers[0]} to {answers[2]}, median {answers[1]}")
    for name in ("faults", "bad_clips", "without_labels", "cuts"):
        found = report.get(name, [])
        if found:
            lines.append(f"{len(found)} {name.replace('_', ' ')}:")
            lines += [f"  {sentence}" for sentence in found]
    lines.append("ready to train on" if report["ok"] else "not ready to train on: mend what is listed above")
    return lines


def _decode_clips(conversations: Sequence[Conversation]) -> tuple[float, dict]:
    """Seconds of sound, and of each clip that can't be used the reason; a clip used twice is decoded once."""
    seconds: dict = {}
    bad: dict = {}
    for clip in (clip for conversation in conversations for clip in conversation.clips):
        if clip not in seconds and clip not in bad:
            try:
                seconds[clip] = len(load_clip(clip)) / SAMPLE_RATE
            except BadClipError as error:
                bad[clip] = str(error)
    return sum(seconds.values()), bad


def _check_labels(
    conversations: Sequence[Conversation], tokenizer, frames: FrameArithmetic, max_length: int | None
) -> dict[str, Any]:
    template, origin = listening_template(tokenizer)
    # Any id serves as the placeholder's here: nothing is looked up.
    collator = ConversationCollator(
        tokenizer, frames, audio_token_id=len(tokenizer), chat_template=template, max_length=max_length
    )
    lengths, answers, cuts, without = [], [], [], []
    for conversation in conversations:
        try:
            rows = collator.encode_rows(conversation)
        except DataError as error:
            without.append(str(error))
            continue
        for row in rows:
            lengths.append(len(row.input_ids))
            answers += [end - start for start, end in row.answer_spans]
            cuts += [f"{row.source}: {event}" for event in row.events]
    spread = [(min(n), int(statistics.median(n)), max(n)) if n else (0, 0, 0) for n in (lengths, answers)]
    return {
        "template": origin,
        "tokens": spread[0],
        "answer_tokens": spread[1],
        "cuts": cuts,
        "without_labels": without,
    }


def _load_tokenizer(name: str, hub: str):
    from qwhisper.model.pretrained import load_tokenizer

    return load_tokenizer(_find_model(name, hub, "--text_model"), "--text_model")


def _load_frames(name: str | None, hub: str) -> FrameArithmetic:
    """The lengths that a new model would have on this encoder, or on Whisper in its default form."""
    from transformers import WhisperConfig

    from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
    from qwhisper.model.pretrained import load_config

    if name is None:
        return Qwen3AudioConfig(audio_config=WhisperConfig()).frames
    config = load_config(_find_model(name, hub, "--audio_model"), "--audio_model")
    return Qwen3AudioConfig(audio_config=config).frames


def _find_model(name: str, hub: str, flag: str) -> str:
    if hub == "huggingface":
        return name
    from qwhisper.model.loading import resolve_model

    return resolve_model(name, hub, flag)
