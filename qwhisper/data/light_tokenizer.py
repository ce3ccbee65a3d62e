"""The part of a Hugging Face tokenizer that an encoder needs, without transformers: for processes that read data.

Ids and rendered texts equal those of the tokenizer that it was made from.
"""

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from qwhisper.data.try_template import environment

if TYPE_CHECKING:
    import jinja2
    from tokenizers import AddedToken, Tokenizer

# Tokenised by both: scripts, numbers, white space, and marks that are added tokens in some vocabularies.
TRIAL = "Hello  World's 1234,\n\n<think>né 语音 🎧</think> <|im_start|>user\n\tx<|im_end|> </s> [INST]"
# From 5.24 on, transformers gives a template a message's reasoning under the second name as well.
REASONING, SECOND_NAME = "reasoning_content", "thinking"


@dataclass(eq=False)
class LightTokenizer:
    """The part of transformers' interface that `data.encode`, `data.template` and `data.text_tokens` use.

    definition: JSON of a `tokenizers.Tokenizer`, which is built on first use: Qwen3's takes half a second.
    special_tokens: by name, as a chat template sees them. reasoning_has_two_names: as in the installed transformers.
    """

    definition: str
    special_tokens: dict[str, str]
    pad_token_id: int | None
    eos_token_id: int | None
    split_special_tokens: bool
    reasoning_has_two_names: bool

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_tokenizer"}

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.definition)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def __call__(
        self, text: str, *, add_special_tokens: bool, split_special_tokens: bool | None = None
    ) -> dict[str, list[int]]:
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        self._tokenizer.encode_special_tokens = split
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> "dict[int, AddedToken]":
        return self._tokenizer.get_added_tokens_decoder()

    def get_added_vocab(self) -> dict[str, int]:
        return {token.content: index for index, token in sorted(self.added_tokens_decoder.items())}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        return [self._tokenizer.id_to_token(index) for index in ids]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str,
        tokenize: bool,
        tools: Sequence[Mapping] | None = None,
        **values: Any,
    ) -> str:
        """The rendered text; `tokenize` must be False. Raises what the template raises."""
        assert not tokenize
        if self.reasoning_has_two_names:
            messages = [{SECOND_NAME: m[REASONING], **m} if REASONING in m else m for m in messages]
        return _compiled(chat_template).render(
            messages=messages, tools=tools, documents=None, **{**self.special_tokens, **values}
        )


def lightened(tokenizer) -> LightTokenizer | None:
    """A transformers tokenizer without transformers; None for one that is more than its `tokenizers.Tokenizer`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    message = {"role": "assistant", "content": "", REASONING: "why"}
    asked = f"{{{{ messages[0].{SECOND_NAME} is defined }}}}"
    light = LightTokenizer(
        definition=backend.to_str(),
        special_tokens=dict(tokenizer.special_tokens_map),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        split_special_tokens=tokenizer.split_special_tokens,
        reasoning_has_two_names=tokenizer.apply_chat_template([message], chat_template=asked, tokenize=False) == "True",
    )
    settings: list[dict[str, bool]] = [{"split_special_tokens": True}, {}]
    vars(light)["_tokenizer"] = backend  # building another of `definition` takes half a second; each call sets both up
    ids = [[each(TRIAL, add_special_tokens=False, **s)["input_ids"] for s in settings] for each in (tokenizer, light)]
    del vars(light)["_tokenizer"]
    return light if ids[0] == ids[1] else None


def dumps(work: Any) -> bytes:
    """Pickle `work`; each transformers tokenizer that can be made a light one becomes one."""
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(work)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if hasattr(type(value), "backend_tokenizer") and (light := lightened(value)) is not None:
            return _itself, (light,)
        return NotImplemented


def _itself(light: LightTokenizer) -> LightTokenizer:
    """The function that unpickling calls in place of the tokenizer's class."""
    return light


@lru_cache(maxsize=64)
def _compiled(chat_template: str) -> "jinja2.Template":
    return environment().from_string(chat_template)
