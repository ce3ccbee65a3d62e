"""What is supervised, and what is left of a dialogue that is longer than a row."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwhisper.data.dialogue import AudioClip, Message
from qwhisper.data.encode import DialogueEncoder, NoLabelsError
from qwhisper.data.rows import IGNORE
from qwhisper.errors import BadClipError, UsageError
from tests.data.conftest import CHATML, dialogue_of, reply, user
from tests.data.drawn import PROPERTY, any_dialogue


@pytest.fixture(scope="session")
def make(frames, chatml_tokenizer):
    """An encoder whose tokens are bytes, so that lengths can be counted by hand."""
    return lambda **options: DialogueEncoder(chatml_tokenizer, frames, audio_token_id=999, **options)


def supervised_text(encoder, sample):
    return encoder.tokenizer.decode(sample.labels[sample.labels != IGNORE])


TWO_TURNS = (Message("system", ("be",)), user("one?"), reply("1"), user("two?"), reply("2"))


@pytest.mark.parametrize(
    ("train_on", "text", "spans"),
    [
        ("assistant", "1<|im_end|>2<|im_end|>", 2),
        ("last", "2<|im_end|>", 1),
        ("all", "one?1<|im_end|>two?2<|im_end|>", 2),
    ],
)
def test_train_on_chooses_what_is_supervised(make, train_on, text, spans):
    encoder = make(train_on=train_on)
    sample = encoder.encode(dialogue_of(*TWO_TURNS))
    assert supervised_text(encoder, sample) == text
    assert len(sample.answer_spans) == spans
    thinking = dialogue_of(*TWO_TURNS[:2], reply("1", "hm"), *TWO_TURNS[3:])
    (row,) = encoder.encode_rows(thinking)
    assert row.events == ["left out the reasoning: the chat template has no place for it"]
    assert supervised_text(encoder, row) == text


def test_relaxed_mask_counts_no_text_twice_where_reasoning_makes_several_rows(frames, qwen3_tokenizer):
    encoder = DialogueEncoder(qwen3_tokenizer, frames, audio_token_id=151669, train_on="all")
    rows = encoder.encode_rows(dialogue_of(user("one?"), reply("1", "hm"), user("two?"), reply("2")))
    assert [supervised_text(encoder, row) for row in rows] == [
        "one?<think>\nhm\n</think>\n\n1<|im_end|>",
        "two?2<|im_end|>",
    ]


def test_messages_after_the_last_answer_are_left_out(make):
    sample = make().encode(dialogue_of(*TWO_TURNS, user("three?")))
    np.testing.assert_array_equal(sample.input_ids, make().encode(dialogue_of(*TWO_TURNS)).input_ids)
    assert sample.events == ["left out 1 messages after the last answer"]
    assert "three?" in make(train_on="all").tokenizer.decode(
        make(train_on="all").encode(dialogue_of(*TWO_TURNS, user("three?"))).input_ids
    )


@settings(PROPERTY, max_examples=60)
@given(data=st.data(), max_length=st.integers(2, 200), train_on=st.sampled_from(["assistant", "last", "all"]))
def test_any_length_keeps_whole_turns_whole_clips_and_a_reply(make, frames, recordings, data, max_length, train_on):
    dialogue = data.draw(any_dialogue(recordings))
    whole = make(train_on=train_on).encode(dialogue)
    encoder = make(train_on=train_on, max_length=max_length)
    try:
        sample = encoder.encode(dialogue)
    except NoLabelsError as error:
        assert "t.jsonl:1: no supervised token is left (kept the last reply alone" in str(error)  # noqa: PT017
        assert max_length < 40
        return
    except BadClipError as error:
        assert "of audio and the reply do not fit into max_length" in str(error)  # noqa: PT017
        without_text = make().encode(dialogue_of(user(*dialogue.messages[-2].clips), dialogue.messages[-1]))
        assert without_text.answer_spans[-1][1] > max_length
        return
    assert len(sample.input_ids) <= max_length
    assert sample.num_supervised > 0
    placeholders = sum(frames.window_tokens(len(window)) for window in sample.windows)
    assert (sample.input_ids == 999).sum() == placeholders
    if any(event.startswith("cut to") for event in sample.events) or not sample.events:
        np.testing.assert_array_equal(sample.input_ids, whole.input_ids[: len(sample.input_ids)])
        assert sample.answer_spans[-1][1] == len(sample.input_ids) or len(sample.input_ids) >= len(whole.input_ids) - 1
    else:
        assert sample.events[0].startswith("kept the last")
        assert len(sample.answer_spans) == 1


def test_long_dialogue_is_cut_after_the_last_turn_that_fits(make):
    whole = make().encode(dialogue_of(*TWO_TURNS))
    first_end = whole.answer_spans[0][1]
    for max_length in (first_end, len(whole.input_ids) - 2):
        sample = make(max_length=max_length).encode(dialogue_of(*TWO_TURNS))
        np.testing.assert_array_equal(sample.input_ids, whole.input_ids[:first_end])
        assert sample.events == [f"cut to 1 of 2 turns: {len(whole.input_ids)} > {max_length} tokens"]
    # The line break after the end goes.
    uncut = make(max_length=len(whole.input_ids) - 1).encode(dialogue_of(*TWO_TURNS))
    assert (len(uncut.answer_spans), uncut.events) == (2, [])


def test_where_the_first_exchange_is_too_long_the_last_reply_is_kept(make, recordings, frames):
    clip = AudioClip(str(recordings[1]))
    tokens = frames.num_tokens(6_400)
    dialogue = dialogue_of(user("x" * 300), reply("1"), user("drop keep", clip), reply("two"))
    # Without both contents and the line break.
    scaffold = len(make().encode(dialogue_of(user("_"), reply("_"))).input_ids) - 3

    def decoded(max_length):
        encoder = make(max_length=max_length)
        sample = encoder.encode(dialogue)
        assert len(sample.windows) == bool((sample.input_ids == 999).sum())
        text = encoder.tokenizer.decode([i for i in sample.input_ids if i != 999])
        return text.replace("<|im_start|>", "[").replace("<|im_end|>\n", "]"), len(sample.windows), sample.events

    exact = scaffold + len("drop keep") + tokens + len("two")
    alone = "kept the last exchange alone"
    assert decoded(exact) == ("[user\ndrop keep][assistant\ntwo<|im_end|>", 1, [alone])
    text, windows, events = decoded(exact - 5)
    assert (text, windows) == ("[user\nkeep][assistant\ntwo<|im_end|>", 1)
    assert events == [f"{alone}, without the first 5 tokens of its prompt's text"]
    with pytest.raises(BadClipError, match=rf"t\.jsonl:1: .*wav: {tokens} tokens of audio and the reply do not fit"):
        make(max_length=exact - 10).encode(dialogue)


def test_where_a_typed_prompt_and_its_reply_are_too_long_the_reply_is_kept(make):
    scaffold = len(make().encode(dialogue_of(user("_"), reply("_"))).input_ids) - 3

    def decoded(max_length):
        encoder = make(max_length=max_length)
        sample = encoder.encode(dialogue_of(user("x" * 300), reply("1"), user("drop"), reply("two")))
        text = encoder.tokenizer.decode(sample.input_ids)
        return text.replace("<|im_start|>", "[").replace("<|im_end|>\n", "]"), sample.events

    assert decoded(scaffold + 3)[0] == "[user\n][assistant\ntwo<|im_end|>"
    text, events = decoded(scaffold + 1)
    assert text == "[user\n][assistant\ntw"
    assert events[1] == f"cut the tail of the reply: {scaffold + 3} > {scaffold + 1} tokens"


def test_row_of_a_reasoned_answer_keeps_that_answer_when_it_is_cut(frames, qwen3_tokenizer):
    encoder = DialogueEncoder(qwen3_tokenizer, frames, audio_token_id=151669, max_length=40)
    history = (user("one?"), reply("1"))
    rows = encoder.encode_rows(dialogue_of(*history, user("word " * 20 + "two?"), reply("2", "hm")))
    assert [supervised_text(encoder, row) for row in rows] == ["1<|im_end|>", "<think>\nhm\n</think>\n\n2<|im_end|>"]
    assert rows[1].events == ["kept the last exchange alone"]
    assert all(len(row.input_ids) <= 40 for row in rows)


def test_encoder_travels_to_a_worker(make):
    encoder = pickle.loads(pickle.dumps(make()))
    np.testing.assert_array_equal(
        encoder.encode(dialogue_of(*TWO_TURNS)).input_ids, make().encode(dialogue_of(*TWO_TURNS)).input_ids
    )


def test_wrong_options_are_refused(make, frames, qwen3_tokenizer):
    with pytest.raises(UsageError, match="train_on is 'user'"):
        make(train_on="user")
    with pytest.raises(UsageError, match="max_length is 1"):
        make(max_length=1)
    with pytest.raises(UsageError, match="not prefix-stable"):
        DialogueEncoder(qwen3_tokenizer, frames, audio_token_id=151669, chat_template=qwen3_tokenizer.chat_template)
    assert make(chat_template=CHATML).chat_template == CHATML
