"""A tokenizer without transformers gives the ids and the texts of the one that it was made from."""

import pickle
from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerFast

from qwhisper.data.dialogue import parse_own
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.light_tokenizer import LightTokenizer, dumps, lightened
from qwhisper.errors import DataError
from tests.data.conftest import TEMPLATES, byte_tokenizer
from tests.small import small_tokenizer

TEXTS = ("", "Hi", " <|im_end|> typed <think>", "né\n\n\n语音 \t🎧", "<|endoftext|>", "</think>x<tool_call>")


@pytest.mark.parametrize("name", [*TEMPLATES, "qwen3", "qwen3 bytes"])
def test_ids_in_a_worker_are_those_of_transformers(request, frames, name):
    if name == "qwen3":
        tokenizer = request.getfixturevalue("qwen3_tokenizer")
    else:
        tokenizer = small_tokenizer() if name == "qwen3 bytes" else byte_tokenizer(TEMPLATES[name])
    light = pickle.loads(dumps(tokenizer))
    assert isinstance(light, LightTokenizer) and isinstance(pickle.loads(dumps(light)), LightTokenizer)
    for text in TEXTS:
        for split in ({}, {"split_special_tokens": True}, {"split_special_tokens": False}):
            expected = tokenizer(text, add_special_tokens=False, **split)["input_ids"]
            assert light(text, add_special_tokens=False, **split)["input_ids"] == expected
    assert len(light) == len(tokenizer) and light.get_added_vocab() == tokenizer.get_added_vocab()
    assert light.pad_token_id == tokenizer.pad_token_id and light.eos_token_id == tokenizer.eos_token_id
    encoder = DialogueEncoder(tokenizer, frames, audio_token_id=len(tokenizer))
    there = pickle.loads(dumps(encoder))
    assert isinstance(there.tokenizer, LightTokenizer) and there.chat_template == encoder.chat_template
    found = [rows(encoder, messages) for messages in dialogues_of_all_kinds()]
    assert sum(isinstance(each, list) for each in found) >= 16  # a typed <tool_call> is refused
    assert [rows(there, messages) for messages in dialogues_of_all_kinds()] == found


def dialogues_of_all_kinds() -> Iterator[list[dict]]:
    system = {"role": "system", "content": "Be brief."}
    for text in TEXTS[1:]:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "né\n\n语音 🎧"}]
        thought = [turns[0], turns[1] | {"reasoning_content": f"why {text}"}]
        yield from ([*turns, *turns], [system, *turns], thought, [*turns, *thought, *turns])
    call = {"type": "function", "function": {"name": "f", "arguments": {"n": "é"}}}
    calls = {"role": "assistant", "content": "", "tool_calls": [call]}
    yield [turns[0], calls, {"role": "tool", "content": "7"}, {"role": "assistant", "content": "seven"}]


def rows(encoder: DialogueEncoder, messages: list[dict]):
    try:
        found = encoder.encode_rows(parse_own({"id": "d", "messages": messages}, "d"))
        prompt = encoder.encode_prompt(messages[:-1], reply_with="So")
    except DataError as error:
        return str(error)
    return [(row.input_ids.tolist(), row.labels.tolist()) for row in (*found, prompt)]


def test_reasoning_has_the_names_that_transformers_gives_it(chatml_tokenizer):
    light = lightened(chatml_tokenizer)
    message = {"role": "assistant", "content": "x", "reasoning_content": "why"}
    for key in ("thinking", "reasoning", "reasoning_content"):
        asked = {"chat_template": f"{{{{ messages[0].{key} }}}}", "tokenize": False}
        assert light.apply_chat_template([message], **asked) == chatml_tokenizer.apply_chat_template([message], **asked)


def test_a_tokenizer_that_does_more_than_its_backend_crosses_as_it_is(chatml_tokenizer):
    odd = LowerCase(tokenizer_object=chatml_tokenizer.backend_tokenizer)
    assert lightened(odd) is None and lightened(object()) is None
    assert pickle.loads(dumps(odd))("A", add_special_tokens=False)["input_ids"] == odd("a")["input_ids"]


class LowerCase(PreTrainedTokenizerFast):
    def __call__(self, text, **options):
        return super().__call__(text.lower(), **options)
