"""Checks a data set before a run: finds every fault in one pass."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwhisper.data.audio import TooLongError
from qwhisper.data.clips import AudioClip, load_clip
from qwhisper.data.dialogue import Dialogue, scan_dialogues, unused_notes
from qwhisper.data.dialogue_audio import MAX_DIALOGUE_SECONDS, check_dialogue_seconds, claimed_by_headers
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.faults import grouped
from qwhisper.data.template import listening_template
from qwhisper.data.text_tokens import typed_tokens
from qwhisper.errors import BadClipError, DataError
from qwhisper.frames import SAMPLE_RATE, FrameArithmetic

MAX_BAD_FRACTION = 0.01  # what training allows by default


def check_dataset(
    path: str | Path,
    data_root: str | Path | None = None,
    *,
    tokenizer=None,
    frames: FrameArithmetic | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Check the structure of every line and decode every clip; with a tokenizer also check labels and lengths.

    Returns counts (`masked`: answers that are not learned), `faults` (sentences with file and line), `bad_clips` (the
    same; also dialogues with too much audio), `notes` (what is not used or perhaps unintended, and how a clip was read,
    if a user should know), and `ok`: no fault, and at most 1 % of the dialogues lost to bad clips or without labels.
    With a tokenizer also `template`, `tokens` and `answer_tokens` (least, median, most), `cuts` and `without_labels`
    (sentences). Raises DataError only if there is no such file, or it is not a JSONL file.
    """
    dialogues, faults = scan_dialogues(path, data_root=data_root)
    clips = _decode_clips(dialogues)
    lost = sum(clips.spoil(dialogue) for dialogue in dialogues)
    report: dict[str, Any] = {
        "file": str(path),
        "dialogues": len(dialogues),
        "answers": sum(m.role == "assistant" for c in dialogues for m in c.messages),
        "masked": sum(m.is_answer and not m.learned for c in dialogues for m in c.messages),
        "clips": sum(len(c.clips) for c in dialogues),
        "audio_seconds": round(sum(length / SAMPLE_RATE for length in clips.lengths.values()), 3),
        "faults": faults,
        "bad_clips": [f"{c.source}: {fault}" for c in dialogues for fault in clips.faults(c)],
        "notes": unused_notes(dialogues) + clips.all_notes(dialogues),
    }
    if tokenizer is not None:
        sound = [c for c in dialogues if not clips.spoil(c)]
        labels = _check_labels(sound, clips, tokenizer, frames or FrameArithmetic(), max_length)
        lost += len(labels["without_labels"])
        report |= labels
        report["notes"] += _typed_tokens(sound, tokenizer)
    report["ok"] = not faults and lost <= MAX_BAD_FRACTION * len(dialogues)
    return report


def report_lines(report: dict[str, Any]) -> list[str]:
    """A report as lines to print: numbers first, then the faults, then the verdict."""
    masked = f" ({report['masked']} of them masked)" if report["masked"] else ""
    lines = [
        f"{report['file']}: {report['dialogues']} dialogues, {report['answers']} answers{masked}, "
        f"{report['clips']} clips, {report['audio_seconds'] / 60:.1f} minutes of audio"
    ]
    if "template" in report:
        tokens, answers = report["tokens"], report["answer_tokens"]
        lines.append(f"chat template: {report['template']}")
        lines.append(f"tokens a row: {tokens[0]} to {tokens[2]}, median {tokens[1]}")
        lines.append(f"supervised tokens an answer: {answers[0]} to {answers[2]}, median {answers[1]}")
    for name in ("faults", "bad_clips", "without_labels", "cuts", "notes"):
        found = report.get(name, [])
        if found:
            lines.append(f"{len(found)} {name.replace('_', ' ')}:")
            lines += [f"  {line}" for line in grouped(found)]
    lines.append("ready to train on" if report["ok"] else "not ready to train on: fix the faults listed above")
    return lines


@dataclass
class _Clips:
    """By clip: its samples at 16 kHz, or why it can't be used, and notes on how it was read; and dialogues that are too
    long.
    """

    lengths: dict[AudioClip, int] = field(default_factory=dict)
    bad: dict[AudioClip, str] = field(default_factory=dict)
    notes: dict[AudioClip, list[str]] = field(default_factory=lambda: defaultdict(list))
    too_long: dict[str, str] = field(default_factory=dict)  # by the dialogue's source

    def faults(self, dialogue: Dialogue) -> list[str]:
        faults = [self.bad[clip] for clip in dict.fromkeys(dialogue.clips) if clip in self.bad]
        return faults + ([self.too_long[dialogue.source]] if dialogue.source in self.too_long else [])

    def all_notes(self, dialogues: Sequence[Dialogue]) -> list[str]:
        """Each note once, at the first use of its clip."""
        first = {clip: dialogue.source for dialogue in reversed(dialogues) for clip in dialogue.clips}
        return [f"{source}: {clip.name}: {note}" for clip, source in first.items() for note in self.notes[clip]]

    def spoil(self, dialogue: Dialogue) -> bool:
        return bool(self.faults(dialogue))


def _decode_clips(dialogues: Sequence[Dialogue]) -> _Clips:
    """Decode every clip once, except those of a dialogue whose headers claim too much."""
    clips = _Clips()
    for dialogue in dialogues:
        try:
            claimed_by_headers(dialogue.clips)
            for clip in dialogue.clips:
                if clip not in clips.lengths and clip not in clips.bad:
                    _decode_clip(clip, clips)
            check_dialogue_seconds([clips.lengths.get(clip, 0) / SAMPLE_RATE for clip in dialogue.clips])
        except TooLongError as error:
            clips.too_long[dialogue.source] = str(error)
    return clips


def _decode_clip(clip: AudioClip, clips: _Clips) -> None:
    try:
        clips.lengths[clip] = len(load_clip(clip, at_most_s=MAX_DIALOGUE_SECONDS, notes=clips.notes[clip]))
    except BadClipError as error:
        clips.bad[clip] = str(error)


def _check_labels(
    dialogues: Sequence[Dialogue], clips: _Clips, tokenizer, frames: FrameArithmetic, max_length: int | None
) -> dict[str, Any]:
    template, origin = listening_template(tokenizer)
    # Any id can be the placeholder's here: no embedding is looked up.
    encoder = DialogueEncoder(
        tokenizer, frames, audio_token_id=len(tokenizer), chat_template=template, max_length=max_length
    )
    lengths, answers, cuts, without = [], [], [], []
    for dialogue in dialogues:
        try:
            rows = encoder.layout_rows(dialogue, lambda of_row: [clips.lengths[clip] for clip in of_row])
        except DataError as error:
            without.append(str(error))
            continue
        for row in rows:
            lengths.append(len(row.input_ids))
            answers += [end - start for start, end in row.answer_spans]
            cuts += [f"{dialogue.source}: {event}" for event in row.events]
    spread = [(min(n), int(statistics.median(n)), max(n)) if n else (0, 0, 0) for n in (lengths, answers)]
    return {
        "template": origin,
        "tokens": spread[0],
        "answer_tokens": spread[1],
        "cuts": cuts,
        "without_labels": without,
    }


def _typed_tokens(dialogues: Sequence[Dialogue], tokenizer) -> list[str]:
    """Report control tokens in an answer: a model would learn to write them letter by letter."""
    return [
        f"{dialogue.source}: message {number}: {token} in an answer is learned as text, not as the token"
        for dialogue in dialogues
        for number, message in enumerate(dialogue.messages, 1)
        if message.is_answer and message.learned
        for token in typed_tokens(tokenizer, message.text)
    ]
