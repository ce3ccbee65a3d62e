"""Assistant: what it answers, whole, in pieces and many at once, and what a later turn costs."""

import itertools
import threading

import numpy as np
import pytest
import soundfile
import torch

from qwhisper.data.messages import Message
from qwhisper.errors import BadClipError, DataError, MemoryLimitError, UsageError
from qwhisper.infer.assistant import Assistant
from qwhisper.infer.decoding import Reader
from tests.infer.conftest import say

NEW_TOKENS = 8


@pytest.fixture
def assistant(small_model) -> Assistant:
    return Assistant(*small_model)


class Computed:
    """Counts the windows that the encoder computes, and the tokens that the language model does, by forward pass."""

    def __init__(self, model):
        self.windows, self.passes = 0, []
        self._hooks = [
            model.model.audio_tower.register_forward_pre_hook(self._count_windows),
            model.model.language_model.register_forward_pre_hook(self._count_tokens, with_kwargs=True),
        ]

    def _count_windows(self, module, inputs):
        self.windows += len(inputs[1].cu_seq_lens_host) - 1

    def _count_tokens(self, module, inputs, keywords):
        self.passes.append(keywords["inputs_embeds"].shape[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


# What it answers


def test_a_stream_is_the_answer_of_a_batch_in_pieces(assistant, conversations, prompts):
    together = assistant.answer_prompts(prompts, max_new_tokens=NEW_TOKENS)
    for messages, prompt, expected in zip(conversations, prompts, together, strict=True):
        stream = assistant.stream(messages, max_new_tokens=NEW_TOKENS)
        assert stream.answer is None
        pieces = list(stream)
        assert "".join(pieces) == expected.text
        assert all(pieces)
        assert stream.answer == expected == assistant.answer(messages, max_new_tokens=NEW_TOKENS)
        assert (expected.finish_reason, expected.completion_tokens) == ("length", NEW_TOKENS)
        audio_tokens = sum(prompt.input_ids == assistant.encoder.audio_token_id)
        assert (expected.prompt_tokens, expected.audio_tokens) == (len(prompt.input_ids), audio_tokens)
    assert len({answer.text for answer in together}) == len(prompts)
    assert assistant.answer_all(conversations, max_new_tokens=NEW_TOKENS) == together
    assert assistant.answer_all([]) == []


def test_many_conversations_are_encoded_some_at_a_time_and_counted_through(assistant, conversations, monkeypatch):
    expected = assistant.answer_all(conversations, max_new_tokens=2)
    monkeypatch.setattr("qwhisper.infer.assistant.AT_ONCE", 2)
    assert assistant.answer_all(conversations, max_new_tokens=2) == expected
    with pytest.raises(DataError, match="conversation 4: "):
        assistant.answer_all([*conversations[:3], []], max_new_tokens=2)


@pytest.mark.usefixtures("letters")
def test_streams_that_share_a_beginning_do_not_disturb_each_other(assistant, small_model, conversations):
    questions = [[*conversations[1], Message("assistant", ("low",)), Message("user", (text,))] for text in ("A?", "B?")]
    expected = [Assistant(*small_model).answer(messages, max_new_tokens=NEW_TOKENS) for messages in questions]
    assistant.answer(conversations[1], max_new_tokens=NEW_TOKENS)
    streams = [assistant.stream(messages, max_new_tokens=NEW_TOKENS) for messages in questions]
    with Computed(assistant.model) as computed:
        pieces = list(zip(*streams, strict=True))
        assert [list(stream) for stream in streams] == [[], []]
    assert ["".join(said) for said in zip(*pieces, strict=True)] == [answer.text for answer in expected]
    assert [stream.answer for stream in streams] == expected
    assert computed.windows == 0 and max(computed.passes) < expected[0].prompt_tokens / 2 + 10


@pytest.mark.usefixtures("letters")
def test_each_token_is_a_piece_as_it_comes(assistant, conversations):
    stream = assistant.stream(conversations[1], max_new_tokens=5)
    with Computed(assistant.model) as computed:
        for n, piece in enumerate(stream, 1):
            assert (len(piece), len(computed.passes)) == (1, n)
    assert n == 5 and stream.answer.text.isalpha()


@pytest.mark.usefixtures("letters")
def test_a_token_of_a_stream_costs_one_wait(assistant, conversations, waits):
    stream, counts = assistant.stream(conversations[1], max_new_tokens=6), []
    with waits:
        for _ in stream:
            counts.append(waits.count)
    assert len(counts) == 6 and {after - before for before, after in itertools.pairwise(counts)} == {1}


def test_pieces_hold_whole_characters_and_nothing_of_a_stop_text(assistant, conversations, write_out):
    write_out("你好 – one, two<|im_end|>")
    stream = assistant.stream(conversations[0])
    assert list(stream) == ["你", "好", " –", " o", "n", "e", ",", " t", "w", "o"]
    assert (stream.answer.finish_reason, stream.answer.completion_tokens) == ("stop", 20)
    for stop in (", t", ["xyz", ", t", "two"]):
        write_out("你好 – one, two<|im_end|>")
        stream = assistant.stream(conversations[0], stop=stop)
        assert list(stream) == ["你", "好", " –", " o", "n", "e"]
        write_out("你好 – one, two<|im_end|>")
        assert assistant.answer_all([conversations[0]] * 2, stop=stop) == [stream.answer] * 2
        assert (stream.answer.text, stream.answer.finish_reason) == ("你好 – one", "stop")


def test_audio_comes_in_every_form(assistant, conversations, tones):
    samples, rate = soundfile.read(tones[0].path, dtype="float32")
    with open(tones[0].path, "rb") as file:
        data = file.read()
    expected = assistant.answer(conversations[1], max_new_tokens=NEW_TOKENS)
    for audio in (tones[0].path, samples, (samples, rate), data):
        assert assistant.answer([say("Pitch?", audio)], max_new_tokens=NEW_TOKENS) == expected


@pytest.mark.parametrize(
    ("messages", "error", "reason"),
    [
        ([], DataError, "empty conversation"),
        ([say("Pitch?", "gone.wav")], DataError, "gone.wav' does not exist"),
        ([say("Pitch?", np.full(800, np.nan))], BadClipError, "message 1, part 1, `audio`: .*NaN or Inf"),
        ([say("Hello", role="usr")], DataError, "unknown role 'usr'"),
        ([say("Be brief.", role="system")], DataError, "no user message: there is nothing to answer"),
    ],
)
def test_messages_that_cannot_be_asked_are_refused_before_anything_is_computed(assistant, messages, error, reason):
    with Computed(assistant.model) as computed:
        with pytest.raises(error, match=reason):
            assistant.stream(messages)
        with pytest.raises(error, match=f"conversation 2: (.|\n)*{reason}"):
            assistant.answer_all([[say("Hello")], messages])
    assert computed.passes == []


@pytest.mark.parametrize("method", ["answer", "stream", "answer_all"])
def test_an_unknown_or_senseless_request_is_refused(assistant, method):
    with pytest.raises(TypeError, match="max_tokens"):
        getattr(assistant, method)([say("Hello")], max_tokens=3)
    with pytest.raises(UsageError, match="top_p is 2"):
        getattr(assistant, method)([say("Hello")], top_p=2)
    for batch_size in (0, -1):
        with pytest.raises(UsageError, match=f"batch_size is {batch_size}"):
            assistant.answer_all([[say("Hello")]], batch_size=batch_size)


def test_the_same_seed_gives_the_same_answer_alone_and_in_a_batch(assistant, conversations):
    random = {"temperature": 2.0, "top_p": 0.9, "max_new_tokens": NEW_TOKENS}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    alone = [assistant.answer(messages, seed=3, **random) for messages in conversations]
    assert assistant.answer_all(conversations, seed=3, batch_size=2, **random) == alone
    assert [assistant.answer(messages, seed=3, **random) for messages in conversations] == alone
    assert [assistant.answer(messages, seed=4, **random) for messages in conversations] != alone
    assert len({assistant.answer(conversations[0], **random).text for _ in range(4)}) > 1
    assert torch.equal(torch.get_rng_state(), before)
    assert alone != assistant.answer_all(conversations, max_new_tokens=NEW_TOKENS)


# An answer that is ended early


@pytest.mark.usefixtures("letters")
def test_cancel_from_another_thread_ends_within_one_token(assistant, conversations):
    stream = assistant.stream(conversations[1], max_new_tokens=50)
    passes = 0

    def cancel_at_the_third(module, inputs):
        nonlocal passes
        passes += 1
        if passes == 3:
            thread = threading.Thread(target=stream.cancel)
            thread.start()
            thread.join()

    hook = assistant.model.model.language_model.register_forward_pre_hook(cancel_at_the_third)
    pieces = list(stream)
    hook.remove()
    assert passes == 3 and len(pieces) == 3
    assert (stream.answer.finish_reason, stream.answer.completion_tokens) == ("cancelled", 3)
    assert stream.answer.text == "".join(pieces)
    assert list(stream) == []


def test_a_stream_that_was_cancelled_before_it_began_computes_nothing(assistant, conversations):
    stream = assistant.stream(conversations[0])
    stream.cancel()
    with Computed(assistant.model) as computed:
        assert list(stream) == []
    assert computed.passes == []
    assert (stream.answer.text, stream.answer.finish_reason, stream.answer.completion_tokens) == ("", "cancelled", 0)


def test_what_was_read_of_a_closed_stream_is_its_answer(assistant, conversations, write_out):
    write_out("one  é, two<|im_end|>")
    with assistant.stream(conversations[0]) as stream:
        pieces = [next(stream) for _ in range(4)]
    assert pieces == ["o", "n", "e", "  é"]
    assert (stream.answer.text, stream.answer.finish_reason, stream.answer.completion_tokens) == (
        "one  é", "cancelled", 7,
    )  # fmt: skip
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    write_out("one<|im_end|>")
    with assistant.stream(conversations[0]) as stream:
        list(stream)
    assert stream.answer.finish_reason == "stop"


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stream_that_an_error_ends_has_the_text_that_was_read_and_does_not_look_whole(
    assistant, conversations, monkeypatch, error
):
    stream = assistant.stream(conversations[1], max_new_tokens=9)
    said = next(stream) + next(stream)
    monkeypatch.setattr(Reader, "read", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(error):
        next(stream)
    assert list(stream) == [] and len(said) == 2
    assert (stream.answer.text, stream.answer.finish_reason) == (said, "cancelled")


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize("end", ["close", "drop"])
def test_what_a_stream_computed_until_it_was_left_is_kept(assistant, conversations, prompts, end):
    stream = assistant.stream(conversations[1], max_new_tokens=50)
    said = next(stream) + next(stream) + next(stream)
    if end == "close":
        stream.close()
    del stream
    again = [*conversations[1], Message("assistant", (said,)), Message("user", ("So?",))]
    with Computed(assistant.model) as computed:
        assistant.answer(again, max_new_tokens=1)
    length = len(assistant.encoder.encode_prompt(again).input_ids)
    assert computed.passes == [length - len(prompts[1].input_ids) - 2] and computed.windows == 0


# A conversation


@pytest.mark.usefixtures("letters")
def test_a_later_turn_computes_only_what_is_new(assistant, small_model, tones):
    """Three turns with a clip each, and a fourth without one; another conversation goes on between them."""
    first, other = [Message("system", ("Be brief.",))], []
    known = {id(first): 0, id(other): 1}  # the token that begins the first turn is every conversation's
    turns = [(first, tones[0]), (other, tones[2]), (first, tones[1]), (first, tones[3]), (other, None), (first, None)]
    for messages, clip in turns:
        messages.append(Message("user", (clip, "Pitch?") if clip else ("So?",)))
        with Computed(assistant.model) as computed:
            answer = assistant.answer(messages, max_new_tokens=NEW_TOKENS)
        assert computed.windows == (clip is not None)
        assert computed.passes == [answer.prompt_tokens - known[id(messages)]] + [1] * (NEW_TOKENS - 1)
        assert answer == Assistant(*small_model).answer(messages, max_new_tokens=NEW_TOKENS)
        messages.append(Message("assistant", (answer.text,)))
        # The last token was chosen, and not read.
        known[id(messages)] = answer.prompt_tokens + answer.completion_tokens - 1


def test_an_answer_that_is_tokenised_otherwise_is_read_again(assistant, small_model, conversations):
    """The random model writes broken characters: as text they are other tokens than it wrote."""
    answer = assistant.answer(conversations[0], max_new_tokens=NEW_TOKENS)
    assert "\ufffd" in answer.text
    same = len(answer.text[: answer.text.index("\ufffd")].encode())
    messages = [*conversations[0], Message("assistant", (answer.text,)), Message("user", ("So?",))]
    with Computed(assistant.model) as computed:
        later = assistant.answer(messages, max_new_tokens=NEW_TOKENS)
    assert computed.passes[0] == later.prompt_tokens - answer.prompt_tokens - same
    assert later == Assistant(*small_model).answer(messages, max_new_tokens=NEW_TOKENS)


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize("changed", ["answer", "clip", "system"])
def test_a_history_that_was_changed_is_read_again_from_there(assistant, small_model, tones, changed):
    history = [Message("system", ("Be brief.",)), Message("user", (tones[0], "Pitch?"))]
    prompt_tokens = assistant.answer(history, max_new_tokens=NEW_TOKENS).prompt_tokens
    other = {
        "answer": [*history, Message("assistant", ("LOW",))],
        "clip": [history[0], Message("user", (tones[3], "Pitch?")), Message("assistant", ("low",))],
        "system": [Message("system", ("Be long.",)), history[1], Message("assistant", ("low",))],
    }[changed]
    messages = [*other, Message("user", ("Sure?",))]
    with Computed(assistant.model) as computed:
        later = assistant.answer(messages, max_new_tokens=NEW_TOKENS)
    ids = assistant.encoder.encode_prompt(messages).input_ids
    common = {"system": len("?system\nBe "), "clip": int(np.argmax(ids == assistant.encoder.audio_token_id))}
    before = common.get(changed, prompt_tokens)
    assert computed.passes[0] == later.prompt_tokens - before
    assert computed.windows == (changed == "clip")
    assert later == Assistant(*small_model).answer(messages, max_new_tokens=NEW_TOKENS)


def test_what_is_kept_is_forgotten(assistant, conversations):
    assert not assistant.forget()
    answer = assistant.answer(conversations[1], max_new_tokens=2)
    assert assistant.forget()
    with Computed(assistant.model) as computed:
        assert assistant.answer(conversations[1], max_new_tokens=2) == answer
    assert computed.passes[0] == answer.prompt_tokens and computed.windows == 1


def test_memory_that_runs_out_costs_what_was_kept_first(assistant, conversations, prompts, monkeypatch):
    expected = assistant.answer(conversations[1], max_new_tokens=2)
    assistant.forget()
    assistant.answer(conversations[0], max_new_tokens=2)
    read, failures = Reader.read, [1]

    def short_of_memory(reader, embeddings):
        if failures:
            raise torch.OutOfMemoryError(failures.pop())
        return read(reader, embeddings)

    monkeypatch.setattr(Reader, "read", short_of_memory)
    assert assistant.answer(conversations[1], max_new_tokens=2) == expected
    failures += [1, 1]
    with pytest.raises(MemoryLimitError, match=f"one prompt of {len(prompts[0].input_ids)} tokens"):
        assistant.answer(conversations[0], max_new_tokens=2)
    stream = assistant.stream(conversations[1])
    next(stream)
    failures += [1]
    with pytest.raises(MemoryLimitError):
        list(stream)
    assert not assistant.forget()  # half of the layers may have read a token that the others have not
