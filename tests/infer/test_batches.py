"""Many prompts at once are answered as each alone, and as `generate` does; memory that runs out halves a batch."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwhisper.data.messages import Message
from qwhisper.data.packing import pad_samples
from qwhisper.data.template import end_of_turn_ids
from qwhisper.errors import MemoryLimitError
from qwhisper.infer.assistant import answer_prompts
from qwhisper.infer.batches import answer_batches
from qwhisper.infer.decoding import Chooser, Reader, Request
from tests.small import large_weights, text_config

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def one_by_one(small_model, prompts) -> list[str]:
    return [answer_prompts(*small_model, [prompt], NEW_TOKENS)[0] for prompt in prompts]


def generated(model, encoder, prompts) -> list[list[int]]:
    """The tokens that transformers' `generate` writes, the most probable ones, up to the end of the turn."""
    batch = pad_samples(prompts, encoder.pad_token_id, padding_side="left")
    ends = end_of_turn_ids(encoder.tokenizer, encoder.chat_template)
    keywords = {"do_sample": False, "eos_token_id": ends, "pad_token_id": encoder.pad_token_id}
    rows = model.generate(**batch, max_new_tokens=NEW_TOKENS, **keywords)[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: next((n for n, token in enumerate(row) if token in ends), len(row))] for row in rows]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_batches_answer_as_single_prompts_and_as_generate(small_model, prompts, one_by_one, batch_size):
    assert answer_prompts(*small_model, prompts, NEW_TOKENS, batch_size) == one_by_one
    assert len(set(one_by_one)) == len(prompts)  # the model tells these prompts apart, so an exchange would show
    tokenizer = small_model[1].tokenizer
    for first in range(0, len(prompts), batch_size):
        rows = generated(*small_model, prompts[first : first + batch_size])
        texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        assert texts == one_by_one[first : first + batch_size]


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3", "gpt2"])
def test_any_language_model_answers_as_its_generate_does(family, small_model):
    _, encoder = small_model
    torch.manual_seed(0)
    values = {"vocab_size": len(encoder.tokenizer), "eos_token_id": encoder.tokenizer.eos_token_id}
    model = AutoModelForCausalLM.from_config(text_config(family, **values)).eval()
    large_weights(model)
    questions = ("Hello", "What is the answer to this question?", "No?")
    typed = [encoder.encode_prompt([Message("user", (question,))]) for question in questions]
    rows = generated(model, encoder, typed)
    (answers,) = answer_batches(model, encoder, typed, Request(max_new_tokens=NEW_TOKENS))
    written = [encoder.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    assert [answers[n].text for n in range(len(typed))] == written
    assert len(set(written)) > 1


def test_generation_config_of_the_base_does_not_make_answers_random(small_model, prompts, one_by_one, monkeypatch):
    model, encoder = small_model
    changed = type(model.generation_config)(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0)
    monkeypatch.setattr(model, "generation_config", changed)
    assert answer_prompts(model, encoder, prompts, NEW_TOKENS) == one_by_one


def test_memory_that_runs_out_halves_the_batch(small_model, prompts, one_by_one, monkeypatch):
    read, sizes = Reader.read, []

    def short_of_memory(reader, embeddings):
        if not reader.past:
            sizes.append(len(embeddings))
        if len(embeddings) > 1:
            raise torch.OutOfMemoryError
        return read(reader, embeddings)

    monkeypatch.setattr(Reader, "read", short_of_memory)
    assert answer_prompts(*small_model, prompts, NEW_TOKENS, 5) == one_by_one
    assert sizes == [5, 2, 1, 1, 1, 1, 1]


def test_one_prompt_too_much_is_named(small_model, prompts, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Reader, "read", out_of_memory)
    with pytest.raises(MemoryLimitError, match=f"one prompt of {len(prompts[0].input_ids)} tokens") as caught:
        answer_prompts(*small_model, prompts[:1], NEW_TOKENS)
    assert caught.value.exit_code == 4


def test_answers_come_batch_by_batch_with_the_longest_prompts_first(small_model, prompts):
    lengths = [len(prompt.input_ids) for prompt in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda n: -lengths[n])
    batches = list(answer_batches(*small_model, prompts, Request(max_new_tokens=1), 2))
    assert [list(batch) for batch in batches] == [longest_first[:2], longest_first[2:4], longest_first[4:]]
    assert all(batch[n].prompt_tokens == lengths[n] for batch in batches for n in batch)


def test_a_batch_is_computed_until_its_last_answer_ends(small_model, prompts, monkeypatch):
    """Each row ends by itself, at its own token; what is computed for it afterwards is no part of its answer."""
    model, encoder = small_model
    tokenizer = encoder.tokenizer
    end = end_of_turn_ids(tokenizer, encoder.chat_template)[0]
    one, seven = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("one", "seven"))
    steps = iter(torch.tensor([[*one, end, *seven][:6], [*seven, end]]).T)
    monkeypatch.setattr(Chooser, "choose", lambda self, logits: next(steps).to(logits.device))
    (batch,) = answer_batches(model, encoder, prompts[2:4], Request(max_new_tokens=9), 2)
    found = [(batch[n].text, batch[n].finish_reason, batch[n].completion_tokens) for n in (1, 0)]
    assert found == [("one", "stop", 4), ("seven", "stop", 6)]
    assert next(steps, None) is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.usefixtures("letters")
def test_a_token_of_all_rows_costs_one_wait(small_model, prompts, waits, temperature):
    found = []
    for new_tokens in (3, 8):
        request, before = Request(max_new_tokens=new_tokens, temperature=temperature), waits.count
        with waits:
            (answers,) = answer_batches(*small_model, prompts, request)
        assert [answer.completion_tokens for answer in answers.values()] == [new_tokens] * len(prompts)
        found.append(waits.count - before)
    assert found[1] - found[0] == 5


def test_no_prompts_give_no_answers(small_model):
    assert answer_prompts(*small_model, [], NEW_TOKENS) == []
