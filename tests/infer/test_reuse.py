"""What was read is read once: the logits are those of a prompt that is read as a whole."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from qwhisper.data.rows import Sample
from qwhisper.infer.decoding import Reader
from qwhisper.infer.reuse import PromptTokens, Reading, ReadingCache
from tests.model.parts import make_sample
from tests.small import SLIDING_WINDOW, small_model

ENOUGH = 2**30


class Counted:
    """Reads prompts of a model with a ReadingCache, and counts what the model computes for each."""

    def __init__(self, family: str, limit_bytes: int = ENOUGH):
        torch.manual_seed(0)
        self.model = small_model(family).eval()
        self.cache = ReadingCache(limit_bytes)
        self.windows = self.tokens = 0
        body = self.model.model
        body.audio_tower.register_forward_pre_hook(self._count_windows)
        body.language_model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)

    def _count_windows(self, module, inputs):
        self.windows += len(inputs[1].cu_seq_lens_host) - 1

    def _count_tokens(self, module, inputs, keywords):
        self.tokens += keywords["inputs_embeds"].shape[1]

    def read(self, prompt: Sample) -> tuple[int, int]:
        """(windows, tokens) that were computed for a prompt; its logits must be those of a fresh reading."""
        fresh = PromptTokens(self.model, prompt)
        expected = Reader(self.model).read(fresh.embed_rest(Reading()))
        self.windows = self.tokens = 0
        asked = PromptTokens(self.model, prompt)
        known = self.cache.take(asked.tokens)
        reader = Reader(self.model, past=known.past)
        logits = reader.read(asked.embed_rest(known))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        self.cache.keep(Reading(list(asked.tokens), reader.past, known.heard))
        return self.windows, self.tokens


def beginning(prompt: Sample, length: int, num_windows: int) -> Sample:
    return replace(prompt, input_ids=prompt.input_ids[:length], windows=prompt.windows[:num_windows])


def with_other_id(prompt: Sample, place: int) -> Sample:
    ids = prompt.input_ids.copy()
    ids[place] = ids[place] % 50 + 3 + (ids[place] % 50 + 3 == ids[place])
    return replace(prompt, input_ids=ids)


FAMILIES = ["qwen3", "llama", "gemma3", "gpt2"]
CLIPS = [3000, 9000]


any_model = cache(small_model)


@pytest.fixture
def prompt() -> Sample:
    """12 tokens of text, a clip, 5 of text, a clip, 6 of text."""
    return make_sample(any_model(), [12, 5, 6], CLIPS)


def num_audio(n: int) -> int:
    return any_model().config.frames.num_tokens(CLIPS[n])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_goes_on_computes_only_what_is_new(family, prompt):
    counted = Counted(family)
    first_turn = 12 + num_audio(0) + 3
    assert first_turn > 2 * SLIDING_WINDOW
    assert counted.read(beginning(prompt, first_turn, 1)) == (1, first_turn)
    assert counted.read(prompt) == (1, len(prompt.input_ids) - first_turn)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_branches_off_computes_from_there_on(family, prompt):
    """A cache with a sliding window can't be cut: all is read again, but no clip is encoded again."""
    counted, whole, place = Counted(family), len(prompt.input_ids), 12 + num_audio(0) + 3
    counted.read(prompt)
    cuttable = family != "gemma3"
    assert counted.read(with_other_id(prompt, place)) == (0, whole - place if cuttable else whole)
    assert counted.read(with_other_id(prompt, 4)) == (0, whole - 4 if cuttable else whole)
    assert counted.read(prompt) == (0, 1 if cuttable else whole)  # which nothing was taken from


@pytest.mark.parametrize("clip", [0, 1])
def test_other_audio_is_never_taken_for_the_same(prompt, clip):
    """Of the same length, and so of the same tokens."""
    counted, start = Counted("qwen3"), [12, 12 + num_audio(0) + 5][clip]
    counted.read(prompt)
    windows = list(prompt.windows)
    windows[clip] = windows[clip] * np.float32(1.001)
    assert counted.read(replace(prompt, windows=windows)) == (1, len(prompt.input_ids) - start)


def test_a_clip_that_stands_twice_is_encoded_once(prompt):
    counted = Counted("qwen3")
    ids = np.concatenate([prompt.input_ids[: 12 + num_audio(0)]] * 2 + [prompt.input_ids[:3]])
    assert counted.read(replace(prompt, input_ids=ids, windows=prompt.windows[:1] * 2))[0] == 1


def test_a_reading_that_ends_within_a_clip_is_cut_before_it(prompt):
    """No reading of ours ends there; one would have to share windows in part."""
    counted = Counted("qwen3")
    asked = PromptTokens(counted.model, prompt)
    embeddings = asked.embed_rest(Reading())
    reader, length = Reader(counted.model), 12 + num_audio(0) - 1
    reader.read(embeddings[:, :length])
    counted.cache.keep(Reading(asked.tokens[:length], reader.past))
    assert counted.read(prompt)[1] == len(prompt.input_ids) - 12


def test_the_least_recently_used_is_dropped_first(prompt):
    one, two, three = (make_sample(any_model(), [20], seed=seed) for seed in range(3))
    reader = Counted("qwen3")
    reader.read(one)
    size = Reading(past=reader.cache._kept[0].past).num_bytes
    assert size == 2 * 2 * 2 * 8 * 20 * 4  # layers, keys and values, heads, head_dim, tokens, fp32
    counted = Counted("qwen3", limit_bytes=2 * size)
    assert [counted.read(prompt)[1] for prompt in (one, two, one, three)] == [20, 20, 1, 20]
    assert [counted.read(prompt)[1] for prompt in (one, two)] == [1, 20]
    counted.read(make_sample(any_model(), [41], seed=3))  # too large to be kept, and no reason to drop another
    assert counted.read(two)[1] == 1
    nothing = Counted("qwen3", limit_bytes=0)
    assert [nothing.read(one)[1] for _ in range(2)] == [20, 20]


def test_what_is_cleared_is_gone(prompt):
    counted = Counted("qwen3")
    assert not counted.cache.clear()
    counted.read(prompt)
    assert counted.cache.clear()
    assert counted.read(prompt) == (2, len(prompt.input_ids))
