"""Judges unknown keys of a record, a message or a part.

Such a key is a fault if it is probably a misspelled key, or if it is an instruction of another framework that is not
followed here. Any other key is metadata: it is not used, and the reader reports it once.
"""

from collections.abc import Collection, Mapping
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

# Keys with which other frameworks control what is learned and how, and what to do about each here.
_PREFERENCE = "preferences are not learned; keep in `messages` the answer to learn"
_NO_VISION = "only audio is read; leave the dialogue out"
_SHAREGPT = "ShareGPT's form is not read; write `messages` with `role` and `content`"
_CALLS = "this form of function calls is not read; write `tools` and `tool_calls`"
_MASK = "write `loss` false on each answer that should not be learned"
_WHOLE_ANSWER = "a part of an answer can't be masked; write `loss` true or false for the whole answer"
_OPTIONS = "a dialogue can't set options of the chat template"
UNSUPPORTED = {
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag"), _PREFERENCE),
    "label": "answers marked as good or bad are not supported; rename the key if it is metadata",
    **dict.fromkeys(("images", "image", "videos", "video", "objects"), _NO_VISION),
    **dict.fromkeys(("conversations", "conversation", "from", "value"), _SHAREGPT),
    **dict.fromkeys(("functions", "function_call"), _CALLS),
    **dict.fromkeys(("mask", "masked", "is_masked", "ignore", "training", "trainable", "no_loss"), _MASK),
    **dict.fromkeys(("train_detail", "training_detail", "prefix", "partial", "loss_mask"), _WHOLE_ANSWER),
    **dict.fromkeys(("loss_scale", "loss_weight"), "an answer is learned or not; write `loss` true or false"),
    **dict.fromkeys(("chat_template_kwargs", "enable_thinking", "add_generation_prompt"), _OPTIONS),
    "history": "write the whole dialogue into `messages`",
    "documents": "write the documents into a message",
    "refusal": "write it as `content`",
}
# The same for keys with a meaning only in a message, or in a part of one.
_STRETCH = "give the stretch as `start` and `end`, in seconds; rename the key if it is metadata"
IN_MESSAGE = UNSUPPORTED | dict.fromkeys(
    ("audio", "audios", "audio_url", "audio_path", "input_audio"),
    "write {'type': 'audio', 'audio': …} into the list `content`",
)
IN_PART = {
    **UNSUPPORTED,
    **dict.fromkeys(("loss", "train", "weight"), _WHOLE_ANSWER),
    **dict.fromkeys(("begin", "stop", "onset", "begin_time", "start_time", "end_time", "stop_time"), _STRETCH),
    **dict.fromkeys(("start_ms", "end_ms", "offset_ms", "start_sample", "end_sample", "frame_offset"), _STRETCH),
    **dict.fromkeys(("channel_id", "channel_index"), "write `channel`, which counts from 0"),
}


def unknown_keys(
    raw: Mapping[str, Any], known: Collection[str], where: str, unsupported: Mapping[str, str] = UNSUPPORTED
) -> tuple[list[str], list[str]]:
    """(faults, keys that are not used) of an object that may have the keys `known`; None as a value means absent.

    where: the beginning of each fault, as in "message 2". unsupported: what to do about each key that is refused.
    """
    faults, unused = [], []
    for key, value in raw.items():
        if key in known or value is None or (key in unsupported and value in ([], {}, "")):
            continue
        key = key[:200] if key.isprintable() else ascii(key)[:200]
        if key in unsupported:
            faults.append(f"{where}: the key `{key}` is not supported: {unsupported[key]}")
        elif nearest := _nearest(key, tuple(name for name in known if name not in raw)):
            faults.append(f"{where}: unknown key `{key}`; did you mean `{nearest}`?")
        else:
            unused.append(key)
    return faults, unused


@lru_cache(maxsize=1024)
def _nearest(key: str, known: tuple[str, ...]) -> str | None:
    """The known key that differs from `key` only in case, in `-` and `_`, or in one letter (in a long key: two)."""
    if len(key) < 4 or len(key) > 40:
        return None
    return next((name for name in known if _edits(_plain(key), _plain(name)) <= (1 if len(name) < 10 else 2)), None)


def _plain(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "")


def _edits(one: str, other: str) -> int:
    """Number of letters that differ: added, left out or replaced; a swapped pair counts once."""
    common = sum(block.size for block in SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks())
    return max(len(one), len(other)) - common
