"""Text to tokens such that nothing typed becomes a control token."""

import re
from functools import lru_cache


def added_token_ids(tokenizer) -> set[int]:
    """Ids of all tokens that are matched as a whole, special or not (`<|im_end|>`, `<think>`)."""
    return set(tokenizer.added_tokens_decoder)


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of what a person or the model wrote: no special or other added token can come out of it.

    `split_special_tokens` leaves `<think>` and `<tool_call>` whole, since they are added but not special; so the text
    is cut inside each of them. Added tokens of white space alone (Gemma's runs of line breaks) are ordinary text.
    """
    inside = [match.start() + 1 for match in _forbidden(tokenizer, len(tokenizer)).finditer(text)]
    ids: list[int] = []
    for start, end in zip([0, *inside], [*inside, len(text)], strict=True):
        ids += tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def typed_tokens(tokenizer, text: str) -> list[str]:
    """The added tokens that stand in a text, each once: `encode_text` makes ordinary text of them."""
    return list(dict.fromkeys(_forbidden(tokenizer, len(tokenizer)).findall(text)))


@lru_cache(maxsize=16)
def _forbidden(tokenizer, num_tokens: int) -> re.Pattern:
    """Finds the added tokens in a text; `num_tokens` in the key notices tokens that were added since."""
    contents = [content for content in tokenizer.get_added_vocab() if content.strip() and len(content) > 1]
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")
