"""A row has what the template makes of its dialogue, and supervises the answers that are learned."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwhisper.data.audio import load_audio
from qwhisper.data.dialogue import Message, parse_dialogue
from qwhisper.data.encode import DialogueEncoder, NoLabelsError
from qwhisper.data.rows import IGNORE
from qwhisper.data.template import end_of_turn_ids
from qwhisper.data.text_tokens import encode_text
from tests.data.conftest import OPEN_THINK, byte_tokenizer, dialogue_of, reply, user
from tests.data.drawn import PROPERTY, any_dialogue

KINDS = pytest.mark.parametrize("kind", ["qwen3", "qwen2.5", "gemma", "moving system", "none"])


@KINDS
@PROPERTY
@given(data=st.data())
def test_every_answer_follows_exactly_its_generation_prompt(encoders, recordings, frames, kind, data):
    encoder = encoders[kind]
    dialogue = data.draw(any_dialogue(recordings))
    sample = encoder.encode(dialogue)
    answers = [k for k, message in enumerate(dialogue.messages) if message.role == "assistant"]
    assert len(sample.answer_spans) == len(answers)
    end = end_of_turn_ids(encoder.tokenizer, encoder.chat_template)[0]
    expected = np.full_like(sample.labels, IGNORE)
    for k, (start, stop) in zip(answers, sample.answer_spans, strict=True):
        prompt = encoder.encode_prompt(dialogue.messages[:k])
        np.testing.assert_array_equal(sample.input_ids[:start], prompt.input_ids)
        assert (prompt.labels == IGNORE).all()
        answer = [*encode_text(encoder.tokenizer, dialogue.messages[k].text.strip()), end]
        assert sample.input_ids[start:stop].tolist() == answer
        expected[start:stop] = answer
    np.testing.assert_array_equal(sample.labels, expected)
    assert sample.num_supervised == sum(stop - start for start, stop in sample.answer_spans)
    lengths = [len(load_audio(clip.path)) for clip in dialogue.clips]
    assert (sample.input_ids == len(encoder.tokenizer)).sum() == sum(map(frames.num_tokens, lengths))
    assert [len(w) for w in sample.windows] == [n for length in lengths for n in frames.window_lengths(length)]


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@settings(PROPERTY, max_examples=15)
@given(data=st.data())
def test_masked_message_is_history_and_nothing_else_changes(encoders, recordings, frames, train_on, data):
    tokenizer = encoders["qwen3"].tokenizer
    encoder = DialogueEncoder(tokenizer, frames, audio_token_id=len(tokenizer), train_on=train_on)
    plain = data.draw(any_dialogue(recordings))
    masks = data.draw(st.lists(st.booleans(), min_size=len(plain.messages), max_size=len(plain.messages)))
    messages = [replace(m, learned=learned) for m, learned in zip(plain.messages, masks, strict=True)]
    learned = [k for k, m in enumerate(messages) if m.role == "assistant" and m.learned]
    assume(learned)
    masked = encoder.encode(dialogue_of(*messages))
    # The same dialogue where all is learned, up to the last answer that is learned.
    whole = encoder.encode(dialogue_of(*plain.messages[: learned[-1] + 1 if train_on != "all" else None]))
    np.testing.assert_array_equal(masked.input_ids, whole.input_ids)
    expected = np.full_like(whole.labels, IGNORE)
    answers = [k for k, m in enumerate(plain.messages[: learned[-1] + 1]) if m.role == "assistant"]
    spans = dict(zip(answers, encoders["qwen3"].encode(plain).answer_spans, strict=False))
    for k in learned[-1:] if train_on == "last" else learned:
        expected[slice(*spans[k])] = whole.input_ids[slice(*spans[k])]
    if train_on == "all":  # where a user's text stands is seen by masking all but it
        for k in [k for k, m in enumerate(messages) if m.role == "user" and m.learned]:
            alone = [replace(m, learned=m.role == "assistant" or n == k) for n, m in enumerate(plain.messages)]
            row = encoder.encode(dialogue_of(*alone))
            typed = row.labels.copy()
            for start, end in row.answer_spans:
                typed[start:end] = IGNORE
            expected = np.where(typed != IGNORE, typed, expected)
    np.testing.assert_array_equal(masked.labels, expected)
    (row,) = encoder.encode_rows(dialogue_of(*messages))
    np.testing.assert_array_equal(row.labels, masked.labels)


def test_masked_answer_token_by_token(encoders):
    tokenizer, encoder = encoders["qwen3"].tokenizer, encoders["qwen3"]
    exchanges = [user("Say one."), reply("One."), user("Sure?"), reply("Yes."), user("Bye."), reply("Bye.")]
    for masked, learned in ((1, "Yes.<|im_end|>Bye.<|im_end|>"), (5, "One.<|im_end|>Yes.<|im_end|>")):
        messages = [replace(m, learned=n != masked) for n, m in enumerate(exchanges)]
        sample = encoder.encode(dialogue_of(*messages))
        assert sample.targets.tolist() == tokenizer(learned)["input_ids"]
        assert sample.events == (["left out 2 messages after the last answer"] if masked == 5 else [])
        assert [tokenizer.decode(sample.input_ids[start:end]) for start, end in sample.answer_spans] == [
            f"{answer}<|im_end|>" for answer in learned.split("<|im_end|>")[:-1]
        ]
    with pytest.raises(NoLabelsError, match=r"t.jsonl:1: every answer is masked, so nothing to learn from"):
        encoder.encode_rows(dialogue_of(*(replace(m, learned=False) for m in exchanges)))


def test_masked_answer_with_reasoning_has_no_row(encoders):
    encoder = encoders["qwen3"]
    exchanges = [user("a"), reply("One.", "Hm."), user("b"), reply("Two.", "Ah."), user("c"), reply("Three.")]
    exchanges[3] = replace(exchanges[3], learned=False)
    texts = [encoder.tokenizer.decode(row.targets) for row in encoder.encode_rows(dialogue_of(*exchanges))]
    assert texts == ["<think>\nHm.\n</think>\n\nOne.<|im_end|>", "Three.<|im_end|>"]


def test_cut_keeps_to_answers_that_are_learned(encoders, frames):
    tokenizer = encoders["qwen3"].tokenizer
    exchanges = [
        user("a"),
        replace(reply("One."), learned=False),
        user("b"),
        reply("Two."),
        user("c" * 100),
        reply("Three."),
    ]
    whole = encoders["qwen3"].encode(dialogue_of(*exchanges))

    def cut(max_length):
        maker = DialogueEncoder(tokenizer, frames, audio_token_id=1, max_length=max_length)
        row = maker.encode(dialogue_of(*exchanges))
        return tokenizer.decode(row.targets), row.events

    first = whole.answer_spans[0][1]
    assert cut(first) == ("Two.<|im_end|>", [f"cut to 2 of 3 turns: {len(whole.input_ids)} > {first} tokens"])
    # The masked answer alone would fit, but nothing would be learned.
    learned, (event,) = cut(first - 1)
    assert learned == "Three.<|im_end|>" and event.startswith("kept the last exchange alone, without the first")


@PROPERTY
@given(data=st.data())
def test_user_text_brings_no_control_token_into_a_row(encoders, recordings, data):
    dialogue = data.draw(any_dialogue(recordings))
    ids = encoders["qwen3"].encode(dialogue).input_ids
    turns = len(dialogue.messages)
    answers = sum(message.role == "assistant" for message in dialogue.messages)
    counts = [(ids == i).sum() for i in (151644, 151645, 151667, 151668, 151657)]
    assert counts == [turns, turns, answers, answers, 0]


@PROPERTY
@given(data=st.data())
def test_reasoning_has_a_row_of_its_own_for_every_answer(encoders, recordings, data):
    encoder = encoders["qwen3"]
    dialogue = data.draw(any_dialogue(recordings, reasoning=True))
    messages = dialogue.messages
    answers = [k for k, message in enumerate(messages) if message.role == "assistant"]
    assume(any(m.reasoning for m in messages) and len(answers) > 1)
    rows = encoder.encode_rows(dialogue)
    assert [row.id for row in rows] == [f"t#{n}" for n in range(1, len(answers) + 1)]
    for k, row in zip(answers, rows, strict=True):
        ((start, stop),) = row.answer_spans
        prompt = encoder.encode_prompt(messages[:k]).input_ids
        if messages[k].reasoning:  # with thinking on, the prompt has no think block: the model writes it
            prompt = prompt[:-4]
            assert encoder.tokenizer.decode(row.input_ids[start:stop]).startswith("<think>\n" + messages[k].reasoning)
            assert row.input_ids[start] == 151667
        np.testing.assert_array_equal(row.input_ids[:start], prompt)
        assert row.input_ids[stop - 1] == 151645
        assert (row.labels[:start] == IGNORE).all()
    whole = encoder.encode(dialogue)
    kept = [k for k in answers if not messages[k].reasoning or k == answers[-1]]
    assert len(whole.answer_spans) == len(kept)
    assert any("which have reasoning" in event for event in whole.events) == (len(kept) < len(answers))


def test_prompt_and_reply_of_a_single_turn_are_what_the_tokenizer_itself_renders(encoders):
    encoder = encoders["qwen3"]
    tokenizer = encoder.tokenizer
    text = [{"role": "user", "content": "Quanto fa 1 + 1?"}, {"role": "assistant", "content": "Due, 两."}]
    messages = [Message(m["role"], (m["content"],)) for m in text]
    whole = tokenizer.apply_chat_template(text, tokenize=False)
    prompt = tokenizer.apply_chat_template(text[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert encoder.encode(dialogue_of(*messages)).input_ids.tolist() == tokenizer(whole)["input_ids"]
    assert encoder.encode_prompt(messages[:1]).input_ids.tolist() == tokenizer(prompt)["input_ids"]
    begun = encoder.encode_prompt(messages[:1], reply_with="Due").input_ids.tolist()
    assert begun == tokenizer(prompt + "Due")["input_ids"]


def test_what_a_prompt_leaves_open_is_for_the_model_to_write(frames):
    """A thinking-only model's prompt ends inside the think block; its end belongs to the answer."""
    answer = "{{- '<think>\\n\\n</think>\\n\\n' if message.role == 'assistant' -}}{{- message.content -}}"
    template = OPEN_THINK.replace(
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}",
        "{{- '<|im_start|>' + message.role + '\\n' -}}" + answer + "{{- '<|im_end|>\\n' -}}",
    )
    tokenizer = byte_tokenizer(template)
    encoder = DialogueEncoder(tokenizer, frames, audio_token_id=999)
    messages = (user("a"), reply("b"), user("c"), reply("d"))
    sample = encoder.encode(dialogue_of(*messages))
    for k, (start, stop) in zip((1, 3), sample.answer_spans, strict=True):
        assert sample.input_ids[:start].tolist() == encoder.encode_prompt(messages[:k]).input_ids.tolist()
        assert tokenizer.decode(sample.input_ids[start:stop]) == f"\n</think>\n\n{messages[k].text}<|im_end|>"


def test_real_recordings_are_heard_at_their_true_length(encoders, shared, frames):
    folder = shared / "data" / "spoken-digits"
    names = ("7_george_0.wav", "3_jackson_1.wav")
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "audio", "audio": name} for name in names]},
            {"role": "assistant", "content": "Seven, three."},
        ]
    }
    encoder = encoders["qwen3"]
    sample = encoder.encode(parse_dialogue(record, "here", folder))
    tokens = [frames.num_tokens(len(load_audio(folder / name))) for name in names]
    audio = np.flatnonzero(sample.input_ids == len(encoder.tokenizer))
    assert len(audio) == sum(tokens) == audio[-1] - audio[0] + 1
    assert len(sample.windows) == 2
