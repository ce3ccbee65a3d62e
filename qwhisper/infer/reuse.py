"""Reuse between prompts: the keys and values of a common beginning, and encoded windows of audio.

Two prompts have a common beginning as far as their tokens are equal and their audio tokens come from equal windows. A
history that has changed, or an answer that is tokenised in another way than it was written, is computed again from
that place on; it is never matched by mistake.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from qwhisper.data.rows import Sample
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration

# An id; for a token of audio, the hash of its window and its place in the window.
Token = int | tuple[bytes, int]


@dataclass(eq=False)
class Reading:
    """Tokens that a language model has read.

    past: as in `Reader`, of exactly these tokens. heard: encoder frames [frames, d_model] by the hash of their window.
    """

    tokens: list[Token] = field(default_factory=list)
    past: dict[str, Cache] = field(default_factory=dict)
    heard: dict[bytes, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        layers = [layer for cache in self.past.values() for layer in cache.layers]
        tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in (*tensors, *self.heard.values()))


class ReadingCache:
    """Readings of earlier prompts and their answers. Drops the least recently used first. Threads may share it.

    limit_bytes: device memory of all readings together; a reading that is larger by itself is not kept.
    """

    def __init__(self, limit_bytes: int):
        self._limit_bytes = limit_bytes
        self._kept: list[Reading] = []  # the least recently used first
        self._lock = Lock()

    def take(self, tokens: Sequence[Token]) -> Reading:
        """The longest beginning of a prompt that was read before, without its last token. The caller may extend it.

        If the prompt continues a reading, the cache gives that reading away. If it branches off, the common part is
        copied. This needs keys and values that can be cut; with a sliding window, only the encoded windows are reused.
        """
        with self._lock:
            heard = self._heard(tokens)
            best = max(self._kept, key=lambda reading: _num_shared(reading.tokens, tokens), default=Reading())
            shared = _num_shared(best.tokens, tokens)
            if not shared:
                return Reading(heard=heard)
            if shared == len(best.tokens):
                self._kept.remove(best)
                return Reading(best.tokens, best.past, best.heard | heard)
            if not all(_can_be_cut(cache) for cache in best.past.values()):
                return Reading(heard=heard)
            self._kept.append(self._kept.pop(self._kept.index(best)))
            past = {name: _beginning(cache, shared) for name, cache in best.past.items()}
            return Reading(best.tokens[:shared], past, heard)

    def keep(self, reading: Reading) -> None:
        if reading.num_bytes > self._limit_bytes:
            return
        with self._lock:
            self._kept.append(reading)
            while self._kept and sum(kept.num_bytes for kept in self._kept) > self._limit_bytes:
                self._kept.pop(0)

    def clear(self) -> bool:
        """Drop all readings. Returns whether there were any."""
        with self._lock:
            found = bool(self._kept)
            self._kept.clear()
            return found

    def _heard(self, tokens: Sequence[Token]) -> dict[bytes, Tensor]:
        windows = dict.fromkeys(token[0] for token in tokens if isinstance(token, tuple))
        known = {window: frames for kept in self._kept for window, frames in kept.heard.items()}
        return {window: known[window] for window in windows if window in known}


class PromptTokens:
    """A prompt for one of our models: its tokens, and the embeddings of those that are not read yet."""

    def __init__(self, model: Qwen3AudioForConditionalGeneration, prompt: Sample):
        self._model = model
        self._device = next(model.get_input_embeddings().parameters()).device
        hashes = [_hash(window) for window in prompt.windows]
        self._windows = dict(zip(hashes, prompt.windows, strict=True))
        self._input_ids = torch.from_numpy(prompt.input_ids)
        frames = model.config.frames
        audio = iter(
            (name, place)
            for name, window in zip(hashes, prompt.windows, strict=True)
            for place in range(frames.window_tokens(len(window)))
        )
        self.tokens: list[Token] = [
            next(audio) if token == model.config.audio_token_id else token for token in prompt.input_ids.tolist()
        ]

    @torch.no_grad()
    def embed_rest(self, reading: Reading) -> Tensor:
        """Embeddings [1, tokens, hidden] after the reading. Encodes missing windows and adds them to the reading."""
        rest = self.tokens[len(reading.tokens) :]
        windows = [token[0] for token in rest if isinstance(token, tuple) and token[1] == 0]
        new = [window for window in dict.fromkeys(windows) if window not in reading.heard]
        body = self._model.model
        if new:
            waveforms = [torch.from_numpy(self._windows[window]) for window in new]
            frames, lengths = body.encode_audio(torch.cat(waveforms), [len(waveform) for waveform in waveforms])
            reading.heard |= dict(zip(new, frames.split(lengths), strict=True))
        input_ids = self._input_ids[len(reading.tokens) :][None].to(self._device)
        if not windows:
            return body.embed(input_ids)
        heard = [reading.heard[window] for window in windows]
        return body.embed(
            input_ids, audio_features=torch.cat(heard), audio_lengths=torch.tensor([len(frames) for frames in heard])
        )


def _hash(window) -> bytes:
    return hashlib.blake2b(window, digest_size=16).digest()


def _num_shared(read: Sequence[Token], tokens: Sequence[Token]) -> int:
    """How many tokens of a prompt were read; only whole windows, and not the last token, whose logits are needed."""
    pairs = zip(read, tokens[:-1], strict=False)
    shared = next((n for n, (own, other) in enumerate(pairs) if own != other), min(len(read), len(tokens) - 1))
    cut = tokens[shared] if shared else 0
    return shared - cut[1] if isinstance(cut, tuple) else shared


def _can_be_cut(cache: Cache) -> bool:
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _beginning(cache: Cache, length: int) -> Cache:
    """A cache of the first tokens of another, which does not change: a DynamicLayer never writes into its tensors."""
    beginning = copy.copy(cache)
    beginning.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in beginning.layers:
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    return beginning
