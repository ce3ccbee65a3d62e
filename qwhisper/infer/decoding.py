"""Decoding: chooses the tokens of an answer one after another, and decodes them to text."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.rows import Sample
from qwhisper.data.template import end_of_turn_ids
from qwhisper.errors import NumericalError, UsageError

MOST_UNSETTLED = 64  # tokens decoded again with each new one; more only if they can't be split
NO_TOKEN = -1  # chosen for a row whose logits are not numbers


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of an answer. The base's generation_config.json is not used: Qwen's samples and penalises.

    temperature: 0 takes the most probable token. Above 0, tokens are drawn from the most probable ones that together
    have `top_p` of the probability. seed: of the draws; None: another answer each time. stop: texts that end the answer
    and are not part of it. Raises UsageError for invalid values.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: str | Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _is(Integral, self.max_new_tokens) or self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens!r}; an answer needs a whole number, at least 1")
        if not _is(Real, self.temperature) or not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature is {self.temperature!r}; give 0 (the most probable answer) or more")
        if not _is(Real, self.top_p) or not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p!r}; give a share of the probability, above 0 and at most 1")
        if self.seed is not None and (not _is(Integral, self.seed) or not -(2**63) <= int(self.seed) < 2**64):
            raise UsageError(f"seed is {self.seed!r}; give a whole number of 64 bits, or None")
        if not isinstance(self.stop, Sequence) or not all(isinstance(text, str) for text in self.stop):
            raise UsageError(f"stop is {self.stop!r}; give a text or a list of texts")
        if "" in self.stop_texts:
            raise UsageError("stop holds an empty text, which would end every answer at once; leave it out")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class Answer:
    """text: without special tokens and surrounding white space.

    finish_reason: "stop" (the model ended its turn, or wrote a stop text), "length" (it wrote max_new_tokens, or up to
    the end of its context) or "cancelled". prompt_tokens: tokens of the prompt, of which audio_tokens are audio.
    completion_tokens: tokens of the answer, including the one that ends the turn.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    audio_tokens: int
    completion_tokens: int


class Reader:
    """A causal LM with the keys and values of the tokens that it has read.

    attention_mask: int64 [rows, tokens], 0 at the left padding of the first tokens; None: no padding. past: the cache,
    under the name that the model's forward and its output use for it (transformers 5.24 changed this name); empty
    before the first read. context: the model's, see `context_length`. With it, a row of several whose answer has ended
    stays at the last position while others read on; a table of learned positions has no further ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention_mask: Tensor | None = None,
        past: dict[str, Cache] | None = None,
        context: int | None = None,
    ):
        self.model = model
        self.context = context
        self.attention_mask = attention_mask
        self.past = dict(past or {})
        self._accepted = inspect.signature(model.forward).parameters

    @torch.no_grad()
    def read(self, embeddings: Tensor) -> Tensor:
        """Read embeddings [rows, new tokens, hidden], which follow those read before.

        Returns float32 [rows, vocabulary], the logits of the next token.
        """
        keywords: dict[str, Any] = {"logits_to_keep": 1, **self._place(embeddings)}
        keywords = {name: value for name, value in keywords.items() if name in self._accepted}
        outputs = self.model(inputs_embeds=embeddings, use_cache=True, **keywords, **self.past)
        self.past = {name: value for name, value in outputs.items() if isinstance(value, Cache)}
        return outputs.logits[:, -1].float()

    @torch.no_grad()
    def read_tokens(self, tokens: Tensor) -> Tensor:
        """Read tokens, int64 [rows], one for each row. Returns the same as `read`."""
        return self.read(self.model.get_input_embeddings()(tokens[:, None]))

    def _place(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Mask and positions of the new tokens; empty without padding, when the model counts the positions itself."""
        if self.attention_mask is None:
            return {}
        if self.past:
            new = self.attention_mask.new_ones(embeddings.shape[:2])
            self.attention_mask = torch.cat([self.attention_mask, new], dim=1)
        positions = (self.attention_mask.cumsum(-1) - 1).masked_fill(self.attention_mask == 0, 0)
        if self.context is not None:
            positions = positions.clamp(max=self.context - 1)
        return {"attention_mask": self.attention_mask, "position_ids": positions[:, -embeddings.shape[1] :]}


def never_written(model: PreTrainedModel) -> list[int]:
    """Ids that no answer contains: the placeholder of audio, if it has a row in the vocabulary."""
    placeholder: int | None = getattr(model.config, "audio_token_id", None)
    if placeholder is None or placeholder >= model.config.get_text_config().vocab_size:
        return []
    return [placeholder]


class Chooser:
    """Chooses the next token of each row. Neither uses nor changes the global random generators.

    Each row draws from its own generator, so that a seed gives the same answer in a batch as alone.
    forbidden: tokens that are never chosen.
    """

    def __init__(self, request: Request, num_rows: int, forbidden: Sequence[int] = ()):
        self._request = request
        self._forbidden = list(forbidden)
        self._generators = [torch.Generator() for _ in range(num_rows)] if request.temperature else []
        for generator in self._generators:
            if request.seed is None:
                generator.seed()
            else:
                generator.manual_seed(int(request.seed))

    def choose(self, logits: Tensor) -> Tensor:
        """logits: float32 [rows, vocabulary], changed in place. Waits for no device.

        Returns int64 [rows], NO_TOKEN for a row whose logits are not numbers. Pass them through `fetch_tokens`, which
        raises for such a row, before the model reads them.
        """
        for token in self._forbidden:
            logits[:, token].fill_(-math.inf)  # `logits[:, tokens]` would upload the list and wait
        largest = logits.amax(dim=-1, keepdim=True)  # NaN if one of them is
        chosen = self._draw(logits, largest) if self._generators else logits.argmax(dim=-1)
        return chosen.masked_fill(~largest[:, 0].isfinite(), NO_TOKEN)

    def _draw(self, logits: Tensor, largest: Tensor) -> Tensor:
        """largest: float32 [rows, 1], of the logits. Returns int64 [rows]."""
        float32 = torch.finfo(torch.float32)  # outside its range the division would give NaN
        temperature = min(max(float(self._request.temperature), float32.tiny), float32.max)
        scaled = (logits - largest) / temperature
        probabilities, tokens = scaled.softmax(dim=-1).sort(dim=-1, descending=True)
        mass = probabilities.cumsum(dim=-1)
        last = ((mass - probabilities) < self._request.top_p).sum(dim=-1, keepdim=True).clamp(min=1) - 1
        drawn = torch.stack([torch.rand(1, generator=generator) for generator in self._generators])
        drawn = drawn.to(mass, non_blocking=True)
        place = torch.searchsorted(mass, drawn * mass.gather(-1, last), right=True)
        return tokens.gather(-1, place.minimum(last))[:, 0]


def fetch_tokens(tokens: Tensor, logits: Tensor) -> list[int]:
    """The tokens that `Chooser.choose` chose by these logits, on the host: the one wait for the device a token.

    Raises NumericalError if the logits of a row are not numbers: any token would be taken for the model's answer.
    """
    fetched: list[int] = tokens.tolist()
    if NO_TOKEN in fetched:
        raise NumericalError(
            f"the model's logits hold {logits[fetched.index(NO_TOKEN)].amax().item()}, so it has no answer; load it "
            "with dtype fp32 or bf16, and check the checkpoint with `qwhisper verify`"
        )
    return fetched


class AnswerText:
    """The answer to one prompt while its tokens come. `finish_reason` is None until a token ends the answer."""

    def __init__(self, encoder: DialogueEncoder, prompt: Sample, request: Request):
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._prompt_tokens = len(prompt.input_ids)
        self._audio_tokens = int((prompt.input_ids == encoder.audio_token_id).sum())
        self._tokenizer = encoder.tokenizer
        self._ends = end_of_turn_ids(encoder.tokenizer, encoder.chat_template)
        self._max_tokens = request.max_new_tokens
        self._stop = request.stop_texts
        self._settled, self._num_settled = "", 0  # text and number of the first tokens, which are not decoded again

    def add(self, token: int) -> None:
        self.tokens.append(token)
        if token in self._ends or (self._stop and self._stop_place(self._decoded()) is not None):
            self.finish_reason = "stop"
        elif len(self.tokens) == self._max_tokens:
            self.finish_reason = "length"

    @property
    def text(self) -> str:
        """The text up to the end of the turn or a stop text, without special tokens and surrounding white space."""
        text = self._decoded()
        return text[: self._stop_place(text)].rstrip()

    @property
    def certain(self) -> str:
        """The beginning of `text` that later tokens can't change."""
        if self.finish_reason is not None:
            return self.text
        text = self._decoded().rstrip("\ufffd")  # a character whose last bytes are missing
        begun = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return text[: len(text) - max(begun, default=0)].rstrip()

    def answer(self) -> Answer:
        """The answer so far; "cancelled" if nothing has ended it."""
        reason = self.finish_reason or "cancelled"
        return Answer(self.text, reason, self._prompt_tokens, self._audio_tokens, len(self.tokens))

    def _decoded(self) -> str:
        ended = bool(self.tokens) and self.tokens[-1] in self._ends
        rest = self.tokens[self._num_settled : -1 if ended else None]
        text = self._decode(rest)
        decoded = (self._settled + text).lstrip()
        if len(rest) > MOST_UNSETTLED:
            half = len(rest) // 2
            first = self._decode(rest[:half])
            if first + self._decode(rest[half:]) == text:  # no character or space is lost at the split
                self._settled += first
                self._num_settled += half
        return decoded

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _stop_place(self, text: str) -> int | None:
        """Index of the first stop text; None without any."""
        return min((place for place in map(text.find, self._stop) if place >= 0), default=None)
