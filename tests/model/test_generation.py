"""Every strategy of transformers' `generate` gives what greedy decoding of a prompt with audio gives, or refuses.

The expected answer is made without `generate`: one forward pass over the whole row a token.
"""

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.streamers import BaseStreamer

from qwhisper.data.packing import pad_samples
from tests.model.parts import make_sample
from tests.small import VOCABULARY, small_model, small_tokenizer, text_config

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
AUDIO = ("audio_waveforms", "audio_lengths")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small_model().eval()


def one_row(model, text=(4, 3, 5), clips=(9000, 5000), seed=0) -> dict:
    batch = pad_samples([make_sample(model, list(text), list(clips), seed=seed)], 0, "left")
    return {name: batch[name] for name in ("input_ids", "attention_mask", *AUDIO)}


def rows(model) -> dict:
    """Two clips, one clip and none in a row."""
    samples = [
        make_sample(model, [4, 3, 5], [9000, 5000]),
        make_sample(model, [2, 6], [7000], seed=1),
        make_sample(model, [5], seed=2),
    ]
    batch = pad_samples(samples, 0, "left")
    return {name: batch[name] for name in ("input_ids", "attention_mask", *AUDIO)}


@torch.no_grad()
def answers(model, batch: dict) -> Tensor:
    """[rows, NEW] of greedy decoding without cache and without `generate`."""
    audio = {name: batch[name] for name in AUDIO}
    embeddings, mask = model.model.embed(batch["input_ids"], **audio), batch["attention_mask"]
    written = []
    for _ in range(NEW):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions).logits[:, -1]
        logits[:, model.config.audio_token_id] = -torch.inf
        written.append(logits.argmax(-1))
        embeddings = torch.cat([embeddings, model.get_input_embeddings()(written[-1])[:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(written, dim=1)


def test_the_answer_depends_on_the_audio(model):
    batch = one_row(model)
    silent = batch | {"audio_waveforms": torch.zeros_like(batch["audio_waveforms"])}
    assert not torch.equal(answers(model, batch), answers(model, silent))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"logits_to_keep": 0},
    ],
    ids=str,
)
def test_each_row_gets_its_own_answer(model, settings):
    batch = rows(model)
    found = model.generate(**batch, **GREEDY, **settings)
    assert torch.equal(found[:, :-NEW], batch["input_ids"])
    assert torch.equal(found[:, -NEW:], answers(model, batch))


@pytest.mark.parametrize("settings", [{"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 2}], ids=str)
def test_beams_of_rows_with_several_clips_are_those_of_each_row_alone(model, settings):
    parts = [make_sample(model, [4, 3, 5], [9000, 5000]), make_sample(model, [4, 5, 3], [6000, 8000], seed=1)]
    together = model.generate(**pad_samples(parts, 0, "left"), **GREEDY, **settings)
    alone = [model.generate(**pad_samples([part], 0, "left"), **GREEDY, **settings) for part in parts]
    assert torch.equal(together[:, -NEW:], torch.cat([row[:, -NEW:] for row in alone]))


def test_samples_of_rows_with_several_clips_hear_their_own_clips(model):
    batch = rows(model)
    settings = GREEDY | {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 2}
    found = model.generate(**batch, **settings)
    assert torch.equal(found[:, -NEW:], answers(model, batch).repeat_interleave(2, dim=0))


def assistants(model) -> dict:
    torch.manual_seed(5)
    text = AutoModelForCausalLM.from_config(text_config()).eval()
    text.get_input_embeddings().weight.data.normal_()
    other = small_model().eval()
    return {"the same": copy.deepcopy(model), "another that listens": other, "text alone": text}


@pytest.mark.parametrize("name", ["the same", "another that listens", "text alone"])
def test_an_assistant_drafts_and_the_answer_stays_the_greedy_one(model, name):
    batch = one_row(model)
    assistant = assistants(model)[name]
    assistant.generation_config.update(num_assistant_tokens=4, num_assistant_tokens_schedule="constant")
    calls, expected = [], answers(model, batch)
    model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    found = model.generate(**batch, **GREEDY, assistant_model=assistant)
    assert torch.equal(found[:, -NEW:], expected)
    if name == "the same":  # its drafts are right, since it hears as well
        assert len(calls) < NEW


@pytest.mark.parametrize("repeats", [1, 3])
def test_prompt_lookup_gives_the_greedy_answer(model, repeats):
    """Drafts are copied from the prompt, placeholders among them."""
    batch = one_row(model)
    greedy = answers(model, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    told = greedy[:, :2].repeat(1, repeats)
    batch |= {"input_ids": torch.cat([told, ids], 1), "attention_mask": torch.cat([torch.ones_like(told), mask], 1)}
    found = model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=5, max_matching_ngram_size=1)
    assert torch.equal(found[:, -NEW:], answers(model, batch))


def test_a_later_turn_on_a_cache_gives_what_the_whole_prompt_gives(model):
    first = one_row(model)
    cache = DynamicCache(config=model.config.get_text_config())
    told = model.generate(**first, **GREEDY, past_key_values=cache)
    question = one_row(model, (3, 4), (6000,), seed=3)
    ids = torch.cat([told, question["input_ids"]], dim=1)
    windows = {name: torch.cat([first[name], question[name]]) for name in AUDIO}
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **windows}
    assert 0 < cache.get_seq_length() < ids.shape[1]
    found = model.generate(**whole, **GREEDY, past_key_values=cache)
    assert torch.equal(found[:, -NEW:], answers(model, whole))


def test_a_later_turn_without_new_audio_encodes_none(model, monkeypatch):
    first = one_row(model)
    cache = DynamicCache(config=model.config.get_text_config())
    told = model.generate(**first, **GREEDY, past_key_values=cache)
    ids = torch.cat([told, torch.tensor([[5, 6, 7]])], dim=1)
    whole = first | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = answers(model, whole)
    monkeypatch.setattr(model.model, "get_audio_features", None)
    assert torch.equal(model.generate(**whole, **GREEDY, past_key_values=cache)[:, -NEW:], expected)


def test_ready_embeddings_with_and_without_ids(model):
    batch = rows(model)
    expected = answers(model, batch)
    embeddings = model.model.embed(batch["input_ids"], **{name: batch[name] for name in AUDIO})
    given = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}
    assert torch.equal(model.generate(**given, **GREEDY), expected)
    found = model.generate(**given, input_ids=batch["input_ids"], **GREEDY)
    assert torch.equal(found, torch.cat([batch["input_ids"], expected], dim=1))
    text = model.get_input_embeddings()(batch["input_ids"])  # the placeholder's embedding marks where audio goes
    assert torch.equal(model.generate(**batch | {"input_ids": None}, inputs_embeds=text, **GREEDY), expected)


REFUSED = [
    ({"prefill_chunk_size": 4}, ValueError, "prefill_chunk_size with audio would lose it"),
    ({"token_healing": True}, ValueError, "token_healing with audio would lose it"),
    ({"assistant_early_exit": 1}, ValueError, "no layers to exit from early; pass assistant_model"),
    ({"cache_implementation": "paged"}, NotImplementedError, "continuous batching takes ids alone"),
]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"encoder_repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_a_placeholder_outside_the_vocabulary_counts_as_one_inside_that_is_never_chosen(settings):
    torch.manual_seed(0)
    model = small_model(audio_token_id=VOCABULARY + 3).eval()
    inside = copy.deepcopy(model)
    inside.resize_token_embeddings(VOCABULARY + 4)
    spare = [VOCABULARY + 1, VOCABULARY, VOCABULARY + 2]
    batch = rows(model)
    expected = inside.generate(**batch, **GREEDY, **settings, suppress_tokens=spare)
    assert torch.equal(model.generate(**batch, **GREEDY, **settings), expected)
    assert not torch.equal(expected, model.generate(**batch, **GREEDY))


@pytest.mark.parametrize(("settings", "error", "words"), REFUSED, ids=lambda value: str(value))
def test_what_would_lose_the_audio_is_refused(model, settings, error, words):
    with pytest.raises(error, match=words):
        model.generate(**one_row(model), **GREEDY, **settings)


def test_continuous_batching_is_refused(model):
    for call in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        with pytest.raises(NotImplementedError, match=r"would lose the audio: pass a left-padded batch to `generate`"):
            call([[5, 6, 7]])


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "the same"}], ids=str)
def test_drafts_after_ready_embeddings_are_refused(model, settings):
    if "assistant_model" in settings:
        settings = {"assistant_model": model}
    embeddings = torch.randn(1, 6, 32)
    with pytest.raises(ValueError, match="assisted decoding with inputs_embeds would not read them"):
        model.generate(inputs_embeds=embeddings, **GREEDY, **settings)


def test_placeholders_without_audio_are_refused(model):
    batch = one_row(model)
    with pytest.raises(ValueError, match=r"\d+ audio placeholders in input_ids, but the audio gives 0 tokens"):
        model.generate(batch["input_ids"], **GREEDY)


class Kept(BaseStreamer):
    def __init__(self):
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_a_streamer_gets_prompt_and_answer(model):
    batch, kept = one_row(model), Kept()
    found = model.generate(**batch, **GREEDY, streamer=kept)
    assert kept.tokens == [*found[0].tolist(), -1]


def test_a_stop_text_ends_the_answer(model):
    tokenizer = small_tokenizer()
    batch = one_row(model)
    written = answers(model, batch)[0].tolist()
    stop = tokenizer.decode(written[2:3])
    ends = next(i for i in range(NEW) if stop in tokenizer.decode(written[: i + 1])) + 1
    found = model.generate(**batch, **GREEDY, stop_strings=[stop], tokenizer=tokenizer)
    assert found[0, batch["input_ids"].shape[1] :].tolist() == written[:ends]


def test_attentions_hidden_states_and_logits_of_an_answer(model):
    model.set_attn_implementation("eager")
    batch = rows(model)
    prompt = batch["input_ids"].shape[1]
    wanted = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    found = model.generate(**batch, **GREEDY, **wanted, output_logits=True)
    assert torch.equal(found.sequences[:, -NEW:], answers(model, batch))
    assert len(found.attentions) == len(found.hidden_states) == len(found.logits) == NEW
    assert found.attentions[0][0].shape == (3, 4, prompt, prompt)
    assert found.attentions[1][0].shape == (3, 4, 1, prompt + 1)
    assert [len(states) for states in found.hidden_states] == [3] * NEW


@torch.no_grad()
def test_a_forward_pass_returns_attentions_hidden_states_and_a_tuple(model):
    batch = rows(model)
    model.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    for part in (model, model.model):
        found = part(**batch, **asked)
        assert len(found.attentions) == 2 and len(found.hidden_states) == 3
        assert torch.allclose(found.attentions[0].sum(-1)[0, :, -1], torch.ones(4))
        values = part(**batch, **asked, return_dict=False)
        assert isinstance(values, tuple) and torch.equal(values[0], found[0]) and len(values) == len(found)
        part.config.return_dict = False
        assert isinstance(part(**batch), tuple)
        part.config.return_dict = True
    assert model(**batch).logits.shape[-1] == VOCABULARY
