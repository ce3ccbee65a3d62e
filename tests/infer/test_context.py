"""A prompt and its answer fit into the model's context; a prompt that does not is refused before it is computed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from qwhisper.data.dialogue import Message
from qwhisper.errors import UsageError
from qwhisper.infer.assistant import Assistant
from qwhisper.infer.batches import answer_batches
from qwhisper.infer.chat import Chat, converse
from qwhisper.infer.context import TooLongPromptError, context_length
from qwhisper.infer.decoding import Request
from tests.small import large_weights, text_config

QUESTION = [Message("user", ("Hello",))]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Qwen3Config(max_position_embeddings=40_960), 40_960),
        (GPT2Config(n_positions=77), 77),
        (
            Qwen3Config(
                max_position_embeddings=40_960,
                rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
            ),
            131_072,
        ),
        (
            Qwen3Config(
                max_position_embeddings=131_072,
                rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
            ),
            131_072,
        ),
    ],
)
def test_the_context_is_that_of_the_configuration_after_scaling(config, expected):
    assert context_length(config) == expected


@pytest.fixture
def short(small_model, monkeypatch):
    """A function that gives an assistant with room for so many tokens behind QUESTION."""
    model, encoder = small_model
    used = len(encoder.encode_prompt(QUESTION).input_ids)

    def make(room: int) -> Assistant:
        monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", used + room)
        return Assistant(model, encoder)

    return make


@pytest.mark.usefixtures("letters")
def test_an_answer_ends_at_the_end_of_the_context(short):
    assistant = short(3)
    whole = Assistant(assistant.model, assistant.encoder).answer(QUESTION, max_new_tokens=3)
    for answer in (assistant.answer(QUESTION, max_new_tokens=50), *assistant.answer_all([QUESTION], max_new_tokens=50)):
        assert (answer.finish_reason, answer.completion_tokens, answer.text) == ("length", 3, whole.text)


def test_a_row_that_has_ended_reads_no_position_beyond_the_context(small_model):
    """GPT-2 has a table of positions; to look behind its end is an error, which on a GPU ends the process."""
    _, encoder = small_model
    torch.manual_seed(0)
    values = {"vocab_size": len(encoder.tokenizer), "eos_token_id": encoder.tokenizer.eos_token_id}
    prompts = [encoder.encode_prompt([Message("user", (text,))]) for text in ("Hello", "Hello " * 8)]
    positions = len(prompts[1].input_ids) + 2
    model = AutoModelForCausalLM.from_config(text_config("gpt2", n_positions=positions, **values)).eval()
    large_weights(model)
    request = Request(max_new_tokens=20)
    (together,) = answer_batches(model, encoder, prompts, request)
    alone = [next(answer_batches(model, encoder, [prompt], request))[0] for prompt in prompts]
    assert [together[0], together[1]] == alone
    assert [(answer.finish_reason, answer.completion_tokens) for answer in alone] == [("length", 20), ("length", 2)]


def test_a_prompt_that_fills_the_context_is_refused_before_anything_is_computed(short, monkeypatch):
    assistant = short(0)
    monkeypatch.setattr(assistant.model, "forward", None)
    used = len(assistant.encoder.encode_prompt(QUESTION).input_ids)
    said = f"takes {used} tokens and the model's context has {used}, so no answer fits: leave out early turns"
    with pytest.raises(TooLongPromptError, match=said):
        assistant.answer(QUESTION)
    fitting = [Message("user", ("",))]
    with pytest.raises(TooLongPromptError, match=f"^conversation 3: the conversation {said}"):
        assistant.answer_all([fitting, fitting, QUESTION])


def test_a_chat_says_that_it_is_full_and_begins_again(short, capsys):
    lines = iter(["Hello", "/reset", "", "/quit"])
    converse(Chat(short(0)), lambda: next(lines))
    said = capsys.readouterr().out
    assert "no answer fits" in said and "`/reset`" in said and said.endswith("(a new conversation)\n")


def test_a_generator_of_conversations_is_read_like_a_list(small_model):
    assistant = Assistant(*small_model)
    conversations = [QUESTION, [Message("user", ("What?",))]]
    expected = assistant.answer_all(conversations, max_new_tokens=2)
    assert assistant.answer_all((each for each in conversations), max_new_tokens=2) == expected
    assert len(expected) == 2


@pytest.mark.parametrize("given", [None, "data.jsonl", {"role": "user", "content": "Hello"}, 3])
def test_what_holds_no_conversations_is_refused(small_model, given):
    with pytest.raises(UsageError, match=rf"answer_all takes a list of conversations.*not {type(given).__name__}"):
        Assistant(*small_model).answer_all(given)
