import pickle
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qwhisper.data import dialogue_audio, lengths
from qwhisper.data.audio import load_audio
from qwhisper.data.dialogue import AudioClip, Message, parse_dialogue
from qwhisper.data.dialogue_audio import DialogueAudio
from qwhisper.data.encode import DialogueEncoder, NoLabelsError
from qwhisper.data.lengths import ClipLengths
from qwhisper.data.rows import IGNORE, Layout, Sample
from qwhisper.data.template import end_of_turn_ids
from qwhisper.data.text_tokens import encode_text
from qwhisper.errors import BadClipError, DataError, UsageError
from tests.data.conftest import CHATML, OPEN_THINK, TEMPLATES, byte_tokenizer, dialogue_of, reply, user

PROPERTY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.sampled_from(["Seven.", "<|im_end|>", "a<think>b</think>", "Which?", "ü 确定\n\n7 ", "<tool_call>{}", "  x"])


@st.composite
def any_dialogue(draw, recordings, reasoning=False):
    """One to four exchanges, now and then a system message, any mixture of texts and clips in the user's turns."""
    clips = st.sampled_from([AudioClip(str(path)) for path in recordings])
    messages = [Message("system", (draw(TEXTS),))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(user(*draw(st.lists(st.one_of(TEXTS, clips), min_size=1, max_size=4))))
        thought = draw(st.sampled_from([None, "Let me see.", "<|im_end|>"])) if reasoning else None
        messages.append(reply(draw(TEXTS), thought))
    return dialogue_of(*messages)


@pytest.fixture(scope="session")
def encoders(frames, qwen3_tokenizer):
    """By the kind of template: Qwen3's, one without think, one made from a table, and the plain one."""
    tokenizers = {
        "qwen3": qwen3_tokenizer,
        **{name: byte_tokenizer(TEMPLATES[name]) for name in ("qwen2.5", "gemma", "moving system", "none")},
    }
    return {name: DialogueEncoder(t, frames, audio_token_id=len(t)) for name, t in tokenizers.items()}


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


def same_row(layout: Layout, sample: Sample) -> bool:
    """Whether a layout has the ids, labels and spans of a sample, as its teacher has."""
    if layout.teacher is not None or sample.teacher is not None:
        assert same_row(layout.teacher, sample.teacher)
    assert layout.input_ids.tolist() == sample.input_ids.tolist()
    assert layout.labels.tolist() == sample.labels.tolist()
    assert (layout.answer_spans, layout.events) == (sample.answer_spans, sample.events)
    return layout.num_supervised == sample.num_supervised


@pytest.fixture(scope="session")
def laying_out(frames, qwen3_tokenizer):
    """By train_on and max_length; with teachers."""
    return {
        (train_on, max_length): DialogueEncoder(
            qwen3_tokenizer, frames, audio_token_id=151669, train_on=train_on, max_length=max_length, teach=True
        )
        for train_on in ("assistant", "last", "all")
        for max_length in (None, 60, 130)
    }


@settings(PROPERTY, max_examples=30)
@given(data=st.data())
def test_layout_without_any_decode_is_that_of_the_sample(laying_out, recordings, frames, data):
    encoder = laying_out[data.draw(st.sampled_from(sorted(laying_out, key=str)))]
    dialogue = data.draw(any_dialogue(recordings, reasoning=True))
    typed = [
        replace(m, content=tuple(replace(p, transcript="x y") if isinstance(p, AudioClip) else p for p in m.content))
        for m in dialogue.messages
    ]
    dialogue = data.draw(st.sampled_from([dialogue, replace(dialogue, messages=tuple(typed))]))
    with pytest.MonkeyPatch.context() as patch:
        for module in (lengths, dialogue_audio):
            patch.setattr(module, "load_clip", lambda *_, **__: pytest.fail("decoded"))
        try:
            layouts = encoder.layout_rows(dialogue, ClipLengths())
            whole = encoder.layout(dialogue, ClipLengths())
        except DataError as error:
            layouts, refused = [], error
    if not layouts:
        with pytest.raises(type(refused)) as raised:
            [encoder.encode_rows(dialogue), encoder.encode(dialogue)]
        assert str(raised.value) == str(refused)
        return
    samples = encoder.encode_rows(dialogue)
    assert len(layouts) == len(samples)
    for layout, sample in zip([*layouts, whole], [*samples, encoder.encode(dialogue)], strict=True):
        assert same_row(layout, sample)
        is_audio = np.zeros(len(layout.input_ids), dtype=bool)
        for slot in layout.slots:
            is_audio[slot.start : slot.start + frames.num_tokens(slot.num_samples)] = True
        assert is_audio.tolist() == (layout.input_ids == 151669).tolist()
        heard = [length for slot in layout.slots for length in frames.window_lengths(slot.num_samples)]
        assert heard == [len(window) for window in sample.windows]
        assert layout.audio_samples == sum(len(load_audio(slot.clip.path)) for slot in layout.slots)
        later = encoder.add_audio(layout)
        assert same_row(layout, later) and later.notes == sample.notes
        for mine, expected in zip(later.windows, sample.windows, strict=True):
            np.testing.assert_array_equal(mine, expected)


def test_row_whose_clip_has_another_length_is_laid_out_again_and_says_so(encoders, recordings):
    encoder, clip = encoders["qwen3"], AudioClip(str(recordings[1]))
    dialogue = dialogue_of(user(clip, "Hm?", clip), reply("Yes."))
    layout = encoder.layout(dialogue, lambda clips: [9_000] * len(clips))
    sample, expected = encoder.add_audio(layout), encoder.encode(dialogue)
    assert len(layout.input_ids) > len(expected.input_ids)
    assert sample.input_ids.tolist() == expected.input_ids.tolist()
    assert sample.labels.tolist() == expected.labels.tolist()
    assert list(map(len, sample.windows)) == list(map(len, expected.windows))
    assert sample.events == [f"laid out again: {clip.path} has 6400 samples at 16 kHz, and was laid out with 9000"]
    assert expected.events == []


def test_every_row_of_a_dialogue_comes_from_one_decode_of_each_clip(encoders, recordings, monkeypatch):
    clips = [AudioClip(str(path)) for path in recordings]
    dialogue = dialogue_of(
        user(clips[0]), reply("1", "hm"), user(clips[1], clips[0]), reply("2", "hm"), user(clips[2]), reply("3", "hm")
    )
    decoded, load = [], dialogue_audio.load_clip
    monkeypatch.setattr(dialogue_audio, "load_clip", lambda clip, **how: decoded.append(clip) or load(clip, **how))
    rows = encoders["qwen3"].encode_rows(dialogue)
    assert [len(row.windows) for row in rows] == [1, 3, 4] and decoded == clips
    encoders["qwen3"].encode_rows(dialogue, audio := encoders["qwen3"].dialogue_audio())
    encoders["qwen3"].encode(dialogue, audio)
    assert decoded == clips * 2


def test_clip_longer_than_a_row_is_not_decoded_for_its_length(frames, recordings, monkeypatch):
    monkeypatch.setattr(dialogue_audio, "LARGE_FILE", 1_000)
    monkeypatch.setattr(dialogue_audio, "load_clip", lambda *_, **__: pytest.fail("decoded"))
    clip = AudioClip(str(recordings[2]))
    assert DialogueAudio(frames, max_length=8).lengths([clip, clip]) == [16_000, 16_000] == ClipLengths()([clip, clip])


def test_files_whose_headers_lie_are_laid_out_by_what_they_have(encoders, recordings, tmp_path):
    encoder, path = encoders["qwen3"], tmp_path.resolve() / "a.flac"
    soundfile.write(path, soundfile.read(recordings[2])[0], 16_000)
    for claimed in (8_000, 16_100):
        content = bytearray(path.read_bytes())
        content[22:26] = claimed.to_bytes(4, "big")
        path.write_bytes(content)
        dialogue = dialogue_of(user(AudioClip(str(path)), "Hm?"), reply("Yes."))
        sample = encoder.encode(dialogue)
        assert same_row(encoder.layout(dialogue, ClipLengths()), sample) and len(sample.windows[0]) == 16_000 + 4_800


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
