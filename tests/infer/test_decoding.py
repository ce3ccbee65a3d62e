"""The next token and the text that tokens make, without a model."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from qwhisper.data.template import end_of_turn_ids
from qwhisper.errors import NumericalError, UsageError
from qwhisper.infer.decoding import (
    MOST_UNSETTLED,
    NO_TOKEN,
    AnswerText,
    Chooser,
    Reader,
    Request,
    fetch_tokens,
    never_written,
)
from tests.small import tone

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 1.5, -3.0]])


def drawn(request: Request, count: int) -> np.ndarray:
    """How often each token is drawn."""
    tokens = Chooser(request, count).choose(LOGITS.repeat(count, 1))
    return np.bincount(tokens.numpy(), minlength=LOGITS.shape[1]) / count


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.45)])
def test_tokens_are_drawn_from_the_most_probable_that_hold_top_p(temperature, top_p):
    probabilities = (LOGITS[0] / temperature).softmax(-1).double().numpy()
    order = np.argsort(-probabilities)
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
    expected = np.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    count = 20_000
    found = drawn(Request(temperature=temperature, top_p=top_p), count)
    assert (found[expected == 0] == 0).all()
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12).all()


@pytest.mark.parametrize("request_", [Request(), Request(temperature=1.0, top_p=1e-9), Request(temperature=1e-30)])
def test_the_most_probable_token_is_taken_where_nothing_else_is_left(request_):
    assert drawn(request_, 50)[0] == 1.0


@pytest.mark.parametrize("top_p", [1.0, 1e-50])
@pytest.mark.parametrize("temperature", [1e-50, 1e300])
def test_values_that_float32_does_not_hold_are_taken_at_its_edge(temperature, top_p):
    found = drawn(Request(temperature=temperature, top_p=top_p), 600)
    assert found[0] == 1.0 if min(temperature, top_p) < 1 else (found > 0.05).all()


def test_numbers_of_numpy_are_numbers():
    request = Request(max_new_tokens=np.int64(3), temperature=np.float32(1), seed=np.int64(5))
    assert Chooser(request, 1).choose(LOGITS.clone()) == Chooser(Request(temperature=1.0, seed=5), 1).choose(LOGITS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_logits_that_are_no_numbers_are_no_answer(temperature, value, shown):
    """The row is marked without a wait, and the fetch of the tokens raises."""
    request, logits = Request(temperature=temperature, seed=5), LOGITS.repeat(3, 1)
    expected = Chooser(request, 3).choose(logits.clone()).tolist()
    assert fetch_tokens(torch.tensor(expected), logits) == expected
    logits[1, 4] = value
    tokens = Chooser(request, 3).choose(logits)
    assert tokens.tolist() == [expected[0], NO_TOKEN, expected[2]]
    with pytest.raises(NumericalError, match=f"logits hold {shown}, "):
        fetch_tokens(tokens, logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choosing_waits_for_no_gpu(temperature):
    request, logits = Request(temperature=temperature, top_p=0.9, seed=5), LOGITS.repeat(3, 1)
    expected = Chooser(request, 3, [0]).choose(logits.clone()).tolist()
    logits = logits.cuda()
    Chooser(request, 3, [0]).choose(logits.clone())  # the first call loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = Chooser(request, 3, [0]).choose(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fetch_tokens(tokens, logits) == expected


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_goes_back_under_the_name_that_it_came_with(name):
    """Which transformers 5.24 changed."""
    given = []

    class Output(dict):
        __getattr__ = dict.__getitem__

    class Model(torch.nn.Module):
        def forward(self, inputs_embeds, use_cache, **keywords):
            given.append(keywords)
            return Output(**{"logits": inputs_embeds, name: keywords.get(name, DynamicCache())})

    reader = Reader(Model())
    for _ in range(2):
        reader.read(torch.zeros(1, 3, 5))
    assert given == [{}, {name: reader.past[name]}]


def test_a_forbidden_token_is_never_chosen():
    assert Chooser(Request(), 1, [0]).choose(LOGITS.clone()) == 4
    tokens = Chooser(Request(temperature=9.0), 500, [0, 4]).choose(LOGITS.repeat(500, 1))
    assert set(tokens.tolist()) == {1, 2, 3, 5}


def test_the_placeholder_is_forbidden_where_it_has_a_row():
    def model(**config):
        return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=10), **config))

    assert [never_written(model(**config)) for config in ({"audio_token_id": 9}, {"audio_token_id": 10}, {})] == [
        [9], [], []
    ]  # fmt: skip


def test_the_same_seed_draws_the_same_in_every_row_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    rows = Chooser(Request(temperature=1.0, seed=5), 3).choose(LOGITS.repeat(3, 1))
    alone = Chooser(Request(temperature=1.0, seed=5), 1).choose(LOGITS.clone())
    Chooser(Request(temperature=1.0), 3).choose(LOGITS.repeat(3, 1))
    assert rows.tolist() == alone.tolist() * 3
    assert torch.equal(torch.get_rng_state(), before)
    others = {Chooser(Request(temperature=1.0, seed=n), 1).choose(LOGITS.clone()).item() for n in range(40)}
    assert len(others) > 3


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"stop": ["a", ""]}, "stop holds an empty text"),
        ({"stop": ""}, "stop holds an empty text"),
        ({"max_new_tokens": 8.5}, "max_new_tokens is 8.5"),  # a count of tokens never equals it
        ({"max_new_tokens": "8"}, "max_new_tokens is '8'"),
        ({"temperature": "0.5"}, "temperature is '0.5'"),
        ({"top_p": None}, "top_p is None"),
        ({"stop": None}, "stop is None"),
        ({"stop": ["a", 3]}, "stop is .'a', 3."),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_a_request_that_means_nothing_is_refused(values, reason):
    with pytest.raises(UsageError, match=reason):
        Request(**values)


@pytest.fixture
def write(small_model, prompts):
    """Writes a text token by token. Returns (the AnswerText, what was certain after each token)."""
    encoder = small_model[1]

    def write(text: str, **request) -> tuple[AnswerText, list[str]]:
        written, certain = AnswerText(encoder, prompts[1], Request(**request)), []
        for token in encoder.tokenizer(text, add_special_tokens=False)["input_ids"]:
            written.add(token)
            certain.append(written.certain)
            if written.finish_reason:
                break
        return written, certain

    return write


END = "<|im_end|>"


@pytest.mark.parametrize(
    ("said", "request_", "text", "reason"),
    [
        (f" seven {END}eight", {}, "seven", "stop"),
        (END, {}, "", "stop"),
        ("<|im_start|>seven", {"max_new_tokens": 6}, "seven", "length"),
        (" seven ", {"max_new_tokens": 7}, "seven", "length"),
        (f"好的，é.{END}", {}, "好的，é.", "stop"),
        ("one two three four", {"stop": ["three", "four"]}, "one two", "stop"),
        ("one two three four", {"stop": "wo t"}, "one t", "stop"),
        (f"\n\none\ntwo{END}", {"stop": "\n"}, "one", "stop"),
        (f"threads{END}", {"stop": "three"}, "threads", "stop"),
        ("threads", {"stop": "three", "max_new_tokens": 4}, "thre", "length"),
        ("one end", {"stop": "end", "max_new_tokens": 7}, "one", "stop"),
        ("好的", {"max_new_tokens": 5}, "好\ufffd", "length"),
    ],
)
def test_an_answer_ends_with_its_turn_a_stop_text_or_its_tokens(write, said, request_, text, reason):
    written, certain = write(said, **request_)
    assert (written.text, written.finish_reason) == (text, reason)
    assert certain[-1] == text
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(certain))
    assert not any("\ufffd" in piece for piece in certain[:-1])
    assert written.answer().text == text


def test_text_is_certain_as_soon_as_it_can_be(write):
    assert write("a b.", stop="b!")[1] == ["a", "a", "a", "a b."]
    assert write("é", max_new_tokens=2)[1] == ["", "é"]


def test_a_long_text_is_not_decoded_from_its_beginning_at_each_token(small_model, write, monkeypatch):
    tokenizer, text = small_model[1].tokenizer, "好的，é. " * 60
    decode, lengths = tokenizer.decode, []

    def counted(tokens, **keywords):
        lengths.append(len(tokens))
        return decode(tokens, **keywords)

    monkeypatch.setattr(tokenizer, "decode", counted)
    written, certain = write(text, stop="never", max_new_tokens=10_000)
    assert len(written.tokens) == len(text.encode()) > 10 * MOST_UNSETTLED
    assert certain[-1] == text.rstrip() == written.text
    assert max(lengths) <= MOST_UNSETTLED + 4  # a character has 3 tokens at most


def test_the_counts_are_those_of_tokens(small_model, write, prompts):
    answer = write(f"seven{END}")[0].answer()
    assert (answer.prompt_tokens, answer.completion_tokens) == (len(prompts[1].input_ids), 6)
    assert answer.audio_tokens == small_model[0].config.frames.num_tokens(len(tone(200, 0.3)))
    assert write("sev")[0].answer().finish_reason == "cancelled"


def test_end_of_the_turn_is_what_the_template_writes(small_model):
    encoder = small_model[1]
    assert encoder.tokenizer.convert_ids_to_tokens(end_of_turn_ids(encoder.tokenizer, encoder.chat_template)) == [END]
