"""Tokenizers, chat templates and recordings for the tests of data."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwhisper.data.dialogue import Dialogue, Message
from qwhisper.data.encode import DialogueEncoder
from qwhisper.frames import FrameArithmetic
from tests.dialogue_files import write  # noqa: F401

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# As Qwen2.5's: it adds a system prompt to a dialogue without one.
QWEN25 = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
) + CHATML
# As Gemma 3's: the system text goes into the first user turn, roles must alternate, contents may be lists.
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}
    {{- message['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
# As DeepSeek-R1's distilled models: the prompt opens a think block that the history does not have.
OPEN_THINK = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
# As Mistral's: the system text moves into the last user turn, so that earlier turns change as the dialogue grows.
MOVING_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- endif -%}"
    "{%- for message in messages if message.role != 'system' -%}"
    "{%- if message.role == 'user' -%}"
    "{{- '[INST]' + ((system + '\\n\\n') if system is defined and loop.last else '') + message.content + '[/INST]' -}}"
    "{%- else -%}{{- message.content + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)
# Ends an answer with nothing that a model could learn to stop at.
ENDLESS = (
    "{%- for message in messages -%}{{- '### ' + message.role + ': ' + message.content + '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### assistant: ' -}}{%- endif -%}"
)
TEMPLATES = {
    "chatml": CHATML,
    "qwen2.5": QWEN25,
    "gemma": GEMMA,
    "open think": OPEN_THINK,
    "moving system": MOVING_SYSTEM,
    "endless": ENDLESS,
    "none": None,
}


def user(*parts):
    return Message("user", parts)


def reply(text, reasoning=None):
    return Message("assistant", (text,), reasoning=reasoning)


def dialogue_of(*messages):
    return Dialogue("t", messages, "t.jsonl:1")


def byte_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, and the added tokens of Qwen and Gemma, some of them not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<bos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]")
    tokenizer.add_special_tokens([AddedToken(content, special=True) for content in special])
    plain = ("<think>", "</think>", "<tool_call>", "\n\n")
    tokenizer.add_tokens([AddedToken(content, special=False, normalized=False) for content in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def chatml_tokenizer():
    return byte_tokenizer(CHATML)


@pytest.fixture(scope="session")
def frames() -> FrameArithmetic:
    return FrameArithmetic(lead_silence_s=0.1, tail_silence_s=0.2)


@pytest.fixture(scope="session")
def recordings(tmp_path_factory) -> list[Path]:
    """Noise of 0.05, 0.4 and 1 second: 9, 18 and 33 tokens at most, with the silence."""
    folder = tmp_path_factory.mktemp("recordings")
    noise = np.random.default_rng(0)
    paths = []
    for seconds in (0.05, 0.4, 1.0):
        paths.append(folder / f"{seconds}.wav")
        soundfile.write(paths[-1], noise.uniform(-0.5, 0.5, round(16_000 * seconds)), 16_000)
    return paths


@pytest.fixture(scope="session")
def encoders(frames, qwen3_tokenizer):
    """By the kind of template: Qwen3's, one without think, one made from a table, and the plain one."""
    tokenizers = {
        "qwen3": qwen3_tokenizer,
        **{name: byte_tokenizer(TEMPLATES[name]) for name in ("qwen2.5", "gemma", "moving system", "none")},
    }
    return {name: DialogueEncoder(t, frames, audio_token_id=len(t)) for name, t in tokenizers.items()}
