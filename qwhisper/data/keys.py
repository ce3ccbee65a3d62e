"""The keys of a record, a message or a part that the reader does not know.

Such a key is a fault if it is probably a known key misspelled, or if it carries an instruction elsewhere that is not
followed here. Any other is metadata: it is not used, and the reader reports it once.
"""

from collections.abc import Collection, Mapping
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

# Keys by which other frameworks say what to learn and how, and what to do about each here.
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
    **dict.fromkeys(("mask", "masked", "ignore", "training"), _MASK),
    **dict.fromkeys(("train_detail", "training_detail", "prefix", "partial", "loss_mask"), _WHOLE_ANSWER),
    **dict.fromkeys(("loss_scale", "loss_weight"), "an answer is learned or not; write `loss` true or false"),
    **dict.fromkeys(("chat_template_kwargs", "enable_thinking", "add_generation_prompt"), _OPTIONS),
    "history": "write the whole dialogue into `messages`",
    "documents": "write the documents into a message",
    "refusal": "write it as `content`",
}


def unknown_keys(raw: Mapping[str, Any], known: Collection[str], where: str) -> tuple[list[str], list[str]]:
    """(faults, keys that are not used) of an object that may have the keys `known`; None as a value means absent.

    where: the beginning of each fault, as in "message 2".
    """
    faults, unused = [], []
    for key, value in raw.items():
        if key in known or value is None or (key in UNSUPPORTED and value in ([], {}, "")):
            continue
        key = key[:200] if key.isprintable() else ascii(key)[:200]
        if nearest := _nearest(key, tuple(name for name in known if name not in raw)):
            faults.append(f"{where}: unknown key `{key}`; did you mean `{nearest}`?")
        elif key in UNSUPPORTED:
            faults.append(f"{where}: the key `{key}` is not supported: {UNSUPPORTED[key]}")
        else:
            unused.append(key)
    return faults, unused


@lru_cache(maxsize=1024)
def _nearest(key: str, known: tuple[str, ...]) -> str | None:
    """The known key that differs from `key` in case, in `-` and `_`, or in one letter (in a long key: two)."""
    if len(key) < 4 or len(key) > 40 or key in UNSUPPORTED:
        return None
    return next((name for name in known if _edits(_plain(key), _plain(name)) <= (1 if len(name) < 10 else 2)), None)


def _plain(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "")


def _edits(one: str, other: str) -> int:
    """How many letters differ: added, left out or replaced; two that changed places count once."""
    common = sum(block.size for block in SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks())
    return max(len(one), len(other)) - common
