import json
import math

import pytest

from qwhisper.data.dialogue import parse_dialogue
from qwhisper.data.messages import Message
from qwhisper.data.tools import ToolCall
from qwhisper.errors import DataError

CALL = {"type": "function", "function": {"name": "look", "arguments": '{"city":"Köln"}'}}
LOOK = ToolCall("look", '{"city": "Köln"}')
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "Say one."}
ONE = {"role": "assistant", "content": "One."}


def parse(*messages, **record):
    return parse_dialogue({"messages": list(messages), **record}, "here:1", ".")


def faults_of(*messages, **record) -> list[str]:
    with pytest.raises(DataError) as error:
        parse(*messages, **record)
    return [line.removeprefix("here:1: ") for line in str(error.value).splitlines()]


# What is learned.


@pytest.mark.parametrize("key", ["loss", "train", "weight"])
@pytest.mark.parametrize(("value", "learned"), [(True, True), (False, False), (1, True), (0, False), (0.0, False)])
def test_key_of_an_answer_says_whether_it_is_learned(key, value, learned):
    first, second = parse(USER, {**ONE, key: value}, USER, ONE).messages[1::2]
    assert (first.learned, second.learned) == (learned, True)


@pytest.mark.parametrize("value", [0.5, 2, -1, "false", "0", [], math.nan])
def test_weight_between_or_beyond_is_refused(value):
    (fault,) = faults_of(USER, {**ONE, "weight": value})
    assert fault.startswith(f"message 2: `weight` is {value!r}; it can be true or 1, false or 0")


def test_keys_that_contradict_each_other_are_refused():
    assert parse(USER, {**ONE, "loss": True, "weight": 1}).messages[1].learned
    (fault,) = faults_of(USER, {**ONE, "loss": True, "weight": 0})
    assert fault == "message 2: `loss` True and `weight` 0 contradict each other"


def test_what_a_user_typed_can_be_masked_but_not_be_learned_by_itself():
    assert not parse({**USER, "loss": False}, ONE).messages[0].learned
    (fault,) = faults_of({**USER, "loss": True}, ONE)
    assert fault.startswith("message 1: only an assistant's message can be learned by itself; --train_on all")


def test_dialogue_without_a_learned_answer_is_refused():
    (fault,) = faults_of(USER, {**ONE, "loss": False}, USER, {**ONE, "weight": 0})
    assert fault == "`loss`, `train` or `weight` mask every answer: there is nothing to learn from"


def test_weight_of_a_whole_dialogue_can_only_be_one():
    assert parse(USER, ONE, weight=1, train=True).messages[1].learned
    assert faults_of(USER, ONE, weight=0)[0].startswith("the whole dialogue is not to be learned; leave it out")
    assert faults_of(USER, ONE, weight=0.5)[0].startswith("the dialogue: `weight` is 0.5; it can be true or 1")


# System and roles.


def test_system_of_the_record_comes_first():
    assert parse(USER, ONE, system="Be brief.").messages[0] == Message("system", ("Be brief.",))
    same = {"role": "developer", "content": "Be brief."}
    assert [message.role for message in parse(same, USER, ONE, system="Be brief. ").messages] == [
        "system",
        "user",
        "assistant",
    ]
    assert parse(USER, ONE, system="").messages[0].role == "user"
    assert faults_of(same, USER, ONE, system="Be kind.") == ["`system` and the system message differ; keep one"]
    assert faults_of(USER, ONE, system=["x"]) == ["`system` must be a text, not list"]


@pytest.mark.parametrize("role", ["human", "gpt", "observation", "function", None, ["user"], {}])
def test_role_of_another_form_is_refused(role):
    assert faults_of({"role": role, "content": "a"}, ONE)[0].startswith(f"message 1: unknown role {role!r}; known are")


def test_sharegpt_form_is_named():
    faults = faults_of({"from": "human", "value": "a"}, ONE)
    assert [fault.split(":")[1] for fault in faults] == [
        " the key `from` is not supported",
        " the key `value` is not supported",
    ]
    with pytest.raises(DataError, match="the key `conversations` is not supported: ShareGPT's form is not read"):
        parse_dialogue({"conversations": [{"from": "human", "value": "a"}]}, "here:1", ".")


# Reasoning.


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_three_names(key):
    assert parse(USER, {**ONE, key: " Hm. "}).messages[1] == Message("assistant", ("One.",), reasoning="Hm.")


def test_reasoning_that_differs_is_refused():
    assert parse(USER, {**ONE, "reasoning": "Hm.", "thinking": "Hm. "}).messages[1].reasoning == "Hm."
    assert faults_of(USER, {**ONE, "reasoning": "Hm.", "thinking": "Ah."}) == [
        "message 2: reasoning and thinking differ; keep one"
    ]
    block = {"role": "assistant", "content": "<think>Ah.</think>One.", "reasoning_content": "Hm."}
    assert "the answer's <think> block differ" in faults_of(USER, block)[0]


@pytest.mark.parametrize(
    ("content", "reasoning", "text"),
    [
        ("<think>\nHm.\n</think>\n\nOne.", "Hm.", "One."),
        ("Hm.\n</think>\n\nOne.", "Hm.", "One."),  # the chat template has written <think>
        ("\n</think>\n\nOne.", None, "One."),
    ],
)
def test_block_before_an_answer_is_reasoning(content, reasoning, text):
    answer = parse(USER, {"role": "assistant", "content": content}).messages[1]
    assert (answer.reasoning, answer.text) == (reasoning, text)


@pytest.mark.parametrize(
    "content",
    ["<think>One.", "One. <think>", "One. <think>Hm.</think>", "a</think>b</think>c", "<think>a<think>b</think>c"],
)
def test_any_other_mark_of_reasoning_is_refused(content):
    assert faults_of(USER, {"role": "assistant", "content": content})[0].startswith(
        "message 2: the answer holds a mark of reasoning"
    )
    assert "holds <think> or </think>" in faults_of(USER, {**ONE, "reasoning_content": content})[0]


def test_reasoning_of_a_user_is_refused():
    assert faults_of({**USER, "reasoning": "Hm."}, ONE) == ["message 1: `reasoning` belongs to an assistant's message"]
    assert parse({**USER, "reasoning": None, "tool_calls": []}, ONE).messages[0].text == "Say one."


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>\n", "<|eot_id|>"])
def test_answer_that_brings_its_own_end_is_refused(end):
    assert (
        "ends with a control token, which the chat template writes"
        in faults_of(USER, {"role": "assistant", "content": "One." + end})[0]
    )
    assert parse(USER, {"role": "assistant", "content": "<|im_end|> ends a turn."}).messages[1].learned


# Tools.


@pytest.mark.parametrize("content", ["", None, "Let me look."])
@pytest.mark.parametrize("arguments", ['{"city":"Köln"}', {"city": "Köln"}])
def test_call_of_openai_is_read(content, arguments):
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": arguments}}
    response = {"role": "tool", "tool_call_id": "a", "content": "7"}
    _, answer, tool, _ = parse(
        USER, {"role": "assistant", "content": content, "tool_calls": [call]}, response, ONE, tools=[TOOL]
    ).messages
    assert answer == Message("assistant", (content,) if content else (), tool_calls=(LOOK,))
    assert tool == Message("tool", ("7",))


def test_other_forms_of_a_call_are_the_same_call():
    bare = {"name": "look", "arguments": {"city": "Köln"}}
    block = f"Let me look.\n<tool_call>\n{json.dumps(bare)}\n</tool_call>"
    expected = Message("assistant", ("Let me look.",), tool_calls=(LOOK, LOOK))
    assert (
        parse(USER, {"role": "assistant", "content": f"{block}\n{block.split(chr(10), 1)[1]}"}).messages[1] == expected
    )
    calls = {"role": "assistant", "content": "Let me look.", "tool_calls": json.dumps([bare, bare])}
    assert parse(USER, calls).messages[1] == expected
    text = {"role": "assistant", "content": "Let me look."}
    swift = {"role": "tool_call", "content": json.dumps(bare)}
    dialogue = parse(USER, text, swift, swift, {"role": "tool_response", "content": "7"}, ONE)
    assert [message.role for message in dialogue.messages] == ["user", "assistant", "tool", "assistant"]
    assert dialogue.messages[1] == expected
    assert parse(USER, swift).messages[1] == Message("assistant", (), tool_calls=(LOOK,))


def test_tools_are_read_from_a_list_or_its_text_with_or_without_wrapper():
    expected = (json.dumps(TOOL, ensure_ascii=False),)
    for tools in ([TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], [TOOL["function"]]):
        assert parse(USER, ONE, tools=tools).tools == expected
    assert parse(USER, ONE, tools=None).tools == parse(USER, ONE, tools=" ").tools == ()


TOOL_FAULTS = {
    "tools no list": ({"tools": 1}, [], "`tools` must be a list, not int"),
    "tools no JSON": ({"tools": "look()"}, [], "`tools` is not valid JSON"),
    "key twice": ({"tools": '[{"name": "a", "name": "b"}]'}, [], "the key 'name' appears twice in one object"),
    "tool without name": ({"tools": [{"description": "a"}]}, [], "tool 1 has no `name`"),
    "NaN": ({"tools": [{"name": "a", "x": math.nan}]}, [], "tool 1 holds NaN or Infinity"),
    "calls no list": ({}, [{**ONE, "tool_calls": 1}], "message 2: `tool_calls` must be a list, not int"),
    "call no object": ({}, [{**ONE, "tool_calls": ["a"]}], "message 2, tool call 1 is not an object"),
    "no name": ({}, [{**ONE, "tool_calls": [{"arguments": {}}]}], "tool call 1: `name` must be the name of a tool"),
    "name": ({}, [{**ONE, "tool_calls": [{"name": 'a"b'}]}], "`name` must be the name of a tool, not 'a\"b'"),
    "arguments": ({}, [{**ONE, "tool_calls": [{"name": "a", "arguments": [1]}]}], "`arguments` must be an object"),
    "arguments text": ({}, [{**ONE, "tool_calls": [{"name": "a", "arguments": "x"}]}], "`arguments` is not valid JSON"),
    "key of a call": ({}, [{**ONE, "tool_calls": [{"name": "a", "argumets": {}}]}], "did you mean `arguments`?"),
    "other key": ({}, [{**ONE, "tool_calls": [{"name": "a", "kwargs": {}}]}], "tool call 1: unknown key `kwargs`"),
    "open block": ({}, [{"role": "assistant", "content": "<tool_call>{}"}], "outside of blocks of JSON at its end"),
    "text behind": (
        {},
        [{"role": "assistant", "content": '<tool_call>{"name": "a"}</tool_call> x'}],
        "outside of blocks of JSON at its end",
    ),
    "user calls": ({}, [{**USER, "tool_calls": [CALL]}], "message 2: `tool_calls` belongs to an assistant's message"),
    "function_call": (
        {},
        [{**ONE, "function_call": {"name": "a"}}],
        "message 2: the key `function_call` is not supported",
    ),
    "empty call": ({}, [{"role": "tool_call", "content": "[]"}], "message 2: no tool call in its `content`"),
    "response of a user": (
        {},
        [{"role": "user", "content": "<tool_response>\n7\n</tool_response>"}],
        "give it a message with the role `tool`",
    ),
    "audio of a tool": ({}, [{"role": "tool", "content": [{"type": "audio", "audio": __file__}]}], "must be text"),
    "mask of a part": (
        {},
        [ONE, {"role": "tool_call", "content": '{"name": "a"}', "loss": False}],
        "message 3: belongs to the answer before it",
    ),
    "wrong id": (
        {},
        [{**ONE, "tool_calls": [{**CALL, "id": "a"}]}, {"role": "tool", "content": "", "tool_call_id": "b"}],
        "message 3: `tool_call_id` 'b', but the call awaited here is 'a'",
    ),
    "wrong order": (
        {},
        [
            {**ONE, "tool_calls": [{**CALL, "id": "a"}, {**CALL, "id": "b"}]},
            {"role": "tool", "content": "7", "tool_call_id": "b"},
        ],
        "put the responses in the order of their calls",
    ),
}


@pytest.mark.parametrize("name", TOOL_FAULTS)
def test_fault_of_a_tool_is_named(name):
    record, messages, sentence = TOOL_FAULTS[name]
    with pytest.raises(DataError) as error:
        parse_dialogue({"messages": [USER, *messages, USER, ONE], **record}, "here:1", "/")
    assert sentence in str(error.value), str(error.value)
