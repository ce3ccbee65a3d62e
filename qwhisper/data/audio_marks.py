"""Placeholders for audio in a text: ms-swift's are filled; any other means that audio is missing."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from qwhisper.data.clips import AudioClip, is_list, parse_audio
from qwhisper.data.messages import Message

FILLED = "<audio>"  # where the `audios` of ms-swift and LLaMA-Factory go
# Placeholders of other models' processors and data sets. Case counts, and only a whole mark matches:
# `<audio src=…>` is ordinary text.
AUDIO_MARKS = (
    FILLED,
    "<|audio_pad|>",  # qwhisper, Qwen3-Omni
    "<|audio_start|>",
    "<|audio_end|>",
    "<|AUDIO|>",  # Qwen2-Audio, Qwen2.5-Omni
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|audio|>",  # Ultravox, Granite Speech, Gemma 4
    "<|begin_of_audio|>",  # GLM-ASR, GLM-4-Voice
    "<|end_of_audio|>",
    "<audio_soft_token>",  # Gemma 3n
    "<start_of_audio>",
    "<end_of_audio>",
    "[AUDIO]",  # Voxtral
    "[BEGIN_AUDIO]",
    "<sound>",  # Audio Flamingo 3
    "<speech>",  # LLaMA-Omni
    "<SpeechHere>",  # SALMONN
    "<AudioHere>",
    "<|speech|>",
)
NUMBERED = (r"<\|audio_\d{1,2}\|>", r"<audio_?\d{1,2}>")  # Phi-4 multimodal's, and what data sets have
ANY_MARK = re.compile("|".join([*map(re.escape, AUDIO_MARKS), *NUMBERED]))


def place_audios(
    messages: Sequence[Message], audios: object, roots: list[Path], faults: list[str], unused: list[str]
) -> list[Message]:
    """Replace each `<audio>` in the text with a clip of `audios`; no other mark is allowed.

    Texts of an assistant or a tool are never searched: an answer may mention HTML's <audio>.
    """
    if audios is not None:
        messages = _fill(messages, audios, roots, faults, unused)
    for number, message in enumerate(messages, 1):
        mark = ANY_MARK.search(message.text) if message.role in ("system", "user") else None
        if mark and not (audios is not None and mark[0] == FILLED):
            faults.append(
                f"message {number}: the text holds the placeholder {mark[0]} without audio; "
                "write {'type': 'audio', 'audio': …} or <audio> and `audios`"
            )
    return list(messages)


def _fill(
    messages: Sequence[Message], audios: object, roots: list[Path], faults: list[str], unused: list[str]
) -> Sequence[Message]:
    audios = [audios] if isinstance(audios, str) else audios
    if not is_list(audios):
        faults.append(f"`audios` must be a list of file names, not {type(audios).__name__}")
        return messages
    marks = sum(message.text.count(FILLED) for message in messages if message.role in ("system", "user"))
    if marks != len(audios):
        lack = "audio without a placeholder" if marks < len(audios) else "a placeholder without audio"
        faults.append(f"{marks} {FILLED} in the text but {len(audios)} in `audios`: {lack}")
        return messages
    clips = iter([parse_audio(audio, f"audio {n}", roots, faults, unused) for n, audio in enumerate(audios, 1)])
    return [_fill_marks(m, clips) if m.role in ("system", "user") else m for m in messages]


def _fill_marks(message: Message, clips: Iterator[AudioClip]) -> Message:
    parts: list[str | AudioClip] = []
    for part in message.content:
        texts = part.split(FILLED) if isinstance(part, str) else []
        parts += [part] if not texts else texts[:1]
        for text in texts[1:]:
            parts += [next(clips), text]
    return replace(message, content=tuple(part for part in parts if part != ""))
