import copy
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer

from qwhisper.data.dialogue import AudioClip, Dialogue, Message, in_words
from qwhisper.engine.executor import Executor
from qwhisper.evaluate import forgetting as module
from qwhisper.evaluate.forgetting import (
    MIN_ANSWERS,
    NO_KIND,
    own_answers,
    retention,
    text_answers,
    text_shift,
)
from qwhisper.evaluate.turns import turns_of
from qwhisper.infer.assistant import answer_prompts
from qwhisper.model.lora import adapter_off, add_lora, lora_parameters

FEW_TOKENS = 6  # of an answer


@pytest.fixture
def adapted(small_model):
    """(model, encoder) with a fresh adapter."""
    model = copy.deepcopy(small_model[0])
    add_lora(model)
    return model, small_model[1]


def kind(heard, text_model):
    return {"heard": heard, "text_model": text_model}


def test_retention_is_of_kinds_never_trained_on_that_the_text_model_answers_well():
    kinds = {"clip": kind(0.5, 1.0), "sum": kind(0.4, 0.8), "next": kind(0.9, 1.0), "even": kind(0.0, 0.5)}
    assert retention(kinds, {"clip"}) == pytest.approx(1.3 / 1.8)
    assert retention({"hello": kind(None, None), "even": kind(0.0, 0.5)}, {"clip"}) is None
    assert retention({NO_KIND: kind(0.5, 1.0)}, {"clip"}) is None  # it may have been
    assert retention(kinds, set()) is None  # any of them may


def dialogues(*clips):
    said = [AudioClip(f"/{n}.wav", transcript=word) for n, word in enumerate(clips)]
    question = Message("user", (*said, "Which?"))
    return [Dialogue("d", (question, Message("assistant", ("two",), kind="last")), "d:1")]


def test_the_text_model_reads_what_was_said_without_the_adapter(adapted, monkeypatch):
    model, encoder = adapted
    asked = []

    def answer(model, encoder, prompts, max_new_tokens, batch_size):
        off = {m.disable_adapters for m in model.modules() if isinstance(m, LoraLayer)}
        asked.append((off, [encoder.tokenizer.decode(prompt.input_ids) for prompt in prompts]))
        return ["two" for _ in prompts]

    monkeypatch.setattr(module, "answer_prompts", answer)
    turns = turns_of(dialogues("one", "two") + dialogues("one", None) + dialogues())
    assert text_answers(model, encoder, turns, 8, 8) == ["two", None, None]
    off, prompts = asked[0]
    assert off == {True} and len(prompts) == 1 and "one two Which?" in prompts[0]


def test_own_answers_are_what_the_base_says_to_the_shipped_instructions(adapted, monkeypatch):
    monkeypatch.setattr(module, "OWN_TOKENS", FEW_TOKENS)
    model, encoder = adapted
    base_rows = own_answers(model.eval(), encoder, 40, seed=3)
    with torch.no_grad():
        for name, parameter in lora_parameters(model):
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    rows = own_answers(model, encoder, 40, seed=3)
    assert [row.input_ids.tolist() for row in rows] == [row.input_ids.tolist() for row in base_rows]
    assert MIN_ANSWERS <= len(rows) <= 40 and len({row.input_ids.tobytes() for row in rows}) == len(rows)
    for row in rows[:3]:
        first = int((row.labels != -100).argmax())
        prompt = replace(row, input_ids=row.input_ids[:first], labels=row.labels[:first])
        with adapter_off(model):
            said = answer_prompts(model, encoder, [prompt], FEW_TOKENS)
        assert [encoder.tokenizer.decode(row.input_ids[first:])] == said
        assert (row.labels[first:] == row.input_ids[first:]).all() and row.num_supervised == len(row.labels) - first


def test_a_base_that_answers_everything_alike_has_no_text_to_be_moved_from(adapted, monkeypatch):
    model, encoder = adapted
    executor = Executor(model.eval(), max_tokens_per_pack=None, pad_token_id=encoder.pad_token_id)
    for different in (MIN_ANSWERS - 1, MIN_ANSWERS):
        monkeypatch.setattr(
            module, "answer_prompts", lambda *args, n=different, **_: [f"a{i % n}" for i in range(len(args[2]))]
        )
        assert len(own_answers(model, encoder)) == (different if different == MIN_ANSWERS else 0)
        shift, why_not = text_shift(executor, encoder, None)
        assert (shift is None) == (different < MIN_ANSWERS) == ("different answers" in (why_not or ""))


def test_text_shift_is_zero_for_a_fresh_adapter_and_grows_with_it(adapted, monkeypatch):
    monkeypatch.setattr(module, "OWN_TOKENS", FEW_TOKENS)
    model, encoder = adapted
    executor = Executor(model, max_tokens_per_pack=64, pad_token_id=encoder.pad_token_id)
    shifts = []
    for scale in (0.0, 0.05, 0.2):
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in lora_parameters(model):
                if "lora_B" in name:
                    parameter.normal_(std=scale) if scale else parameter.zero_()
        shifts.append(text_shift(executor, encoder, dialogues("one", "two"))[0])
    assert shifts[0] == pytest.approx(0.0, abs=1e-6) and 0 < shifts[1] < shifts[2]
    assert text_shift(executor, encoder, None)[0] > 0


def test_text_that_cannot_be_read_in_words_is_said_to_be(adapted):
    model, encoder = adapted
    executor = Executor(model, max_tokens_per_pack=64, pad_token_id=encoder.pad_token_id)
    mute, unanswered = dialogues("one", None)[0], dialogues()[0]
    unanswered = replace(unanswered, messages=unanswered.messages[:1])
    assert text_shift(executor, encoder, [mute, unanswered]) == (
        None,
        "no dialogue of the text file can be read in words; the first: d:1: a clip has no `transcript`",
    )
    assert "the first: d:1: no assistant message" in text_shift(executor, encoder, [unanswered])[1]
    assert text_shift(executor, encoder, [mute, *dialogues("one")])[1] is None


@pytest.mark.parametrize(
    ("content", "typed"),
    [
        ((AudioClip("/a", transcript="seven"), "Which digit?"), "seven Which digit?"),
        ((AudioClip("/a", transcript="one"), AudioClip("/b", transcript="two")), "one two"),
        (("Listen:\n", AudioClip("/a", transcript="one"), " and "), "Listen:\none and "),
        (("a", "b"), "ab"),
        ((AudioClip("/a", transcript="确定"),), "确定"),
    ],
)
def test_in_words_puts_a_space_where_nothing_else_parts_a_clip_from_its_neighbours(content, typed):
    (message,) = in_words([Message("user", content, kind="k")])
    assert message == Message("user", (typed,), kind="k")
