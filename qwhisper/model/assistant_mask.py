"""Which tokens of a rendered chat the assistant wrote: the `assistant_masks` of a processor.

A span is the (start, end) of characters in the text of a chat, in which each clip is still one placeholder.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qwhisper.data.template import end_of_turn_ids
from qwhisper.errors import DataError, UsageError

Span = tuple[int, int]
THINKS = "enable_thinking"  # a template that writes think blocks asks for it
MARK_THEM = "put {% generation %} and {% endgeneration %} around them"
MARKED = re.compile(r"{%-?\s*generation\s*-?%}")


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    dialogue: Sequence[dict],
    text: str,
    render: Callable[..., str],
    options: dict[str, Any],
) -> list[Span]:
    """The spans that a template marks with `{% generation %}`, or else those that training supervises: each answer,
    with the token that ends it.

    text: the rendered dialogue. render: renders other messages with the same options. options: of `render`. Raises
    ValueError for an answer that doesn't follow its generation prompt.
    """
    if MARKED.search(chat_template):
        _, (spans,) = render_jinja_template(
            [dialogue],
            chat_template=chat_template,
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **options},
        )
        return [(start, end) for start, end in spans]
    try:
        closing = tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer, chat_template)[0])
    except (DataError, UsageError) as error:
        raise ValueError(f"the answers of this chat template can't be found: {error}; {MARK_THEM}") from error
    spans = []
    for index, message in enumerate(dialogue):
        if message["role"] != "assistant":
            continue
        # A prompt for an answer with reasoning ends before its think block, which a template leaves out of the history.
        modes = [False, True] if message.get("reasoning_content") else [False]
        thinking = [{"enable_thinking": mode} for mode in modes] if THINKS in chat_template else [{}]
        prompts = [render(dialogue[:index], add_generation_prompt=True, **own) for own in thinking if index]
        start = max((len(prompt) for prompt in prompts if text.startswith(prompt)), default=None)
        end = -1 if start is None else text.find(closing, start)
        if start is None or end < 0:
            raise ValueError(
                f"message {index + 1}: the chat template writes this answer with another beginning or end than in "
                f"training, and marks no answers: {MARK_THEM}"
            )
        spans.append((start, end + len(closing)))
    return spans


def add_assistant_masks(inputs: BatchFeature, spans: Sequence[Sequence[Span]]) -> None:
    """Add `assistant_masks`, of the form of input_ids: 1 for each token that shares a character with a span.

    inputs: a processor's with `offset_mapping` and `text_replacement_offsets`. spans: those of each text.
    """
    masks = []
    for offsets, replacements, own in zip(
        inputs["offset_mapping"], inputs["text_replacement_offsets"], spans, strict=True
    ):
        starts, ends = np.asarray(offsets).T
        mask = np.zeros(len(starts), dtype=np.int64)
        for start, end in own:
            mask[(starts < _expanded(end, replacements)) & (ends > _expanded(start, replacements))] = 1
        masks.append(mask)
    like = inputs["input_ids"]
    if isinstance(like, torch.Tensor):
        inputs["assistant_masks"] = torch.from_numpy(np.stack(masks))
    else:
        inputs["assistant_masks"] = np.stack(masks) if isinstance(like, np.ndarray) else [m.tolist() for m in masks]


def _expanded(position: int, replacements: Sequence[dict]) -> int:
    """Where a character of a text lies once each placeholder before it is as many as its clip has tokens."""
    before = bisect_right([replaced["span"][1] for replaced in replacements], position)
    return position + sum(
        replaced["new_span"][1] - replaced["span"][1] for replaced in replacements[before - 1 : before]
    )
