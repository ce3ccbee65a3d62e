import pytest

from qwhisper.data.dialogue import parse_dialogue
from qwhisper.data.keys import UNSUPPORTED, unknown_keys
from qwhisper.errors import DataError

KNOWN = ("role", "content", "kind", "loss", "weight", "reasoning_content", "tool_calls", "messages", "audios", "tools")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("mesages", "messages"),
        ("Messages", "messages"),
        ("message", "messages"),
        ("weigth", "weight"),
        ("kinds", "kind"),
        ("audio", "audios"),
        ("reasoning_contents", "reasoning_content"),
        ("reasoningContent", "reasoning_content"),
        ("tool-calls", "tool_calls"),
        ("lss", None),
        ("idx", None),
        ("message_id", None),
        ("speaker", None),
        ("duration", None),
    ],
)
def test_misspelled_key_is_a_fault_and_metadata_is_not(key, nearest):
    faults, unused = unknown_keys({key: 1}, KNOWN, "message 2")
    assert faults == ([f"message 2: unknown key `{key}`; did you mean `{nearest}`?"] if nearest else [])
    assert unused == ([] if nearest else [key])


def test_key_beside_the_one_that_it_resembles_is_metadata():
    assert unknown_keys({"content": "a", "context": "b"}, KNOWN, "message 2") == ([], ["context"])


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_instruction_of_another_framework_is_a_fault_that_says_what_to_do(key):
    (fault,), unused = unknown_keys({key: [1]}, KNOWN, "message 2")
    assert fault == f"message 2: the key `{key}` is not supported: {UNSUPPORTED[key]}"
    assert unused == []


def test_key_that_holds_a_line_break_stays_on_one_line():
    assert unknown_keys({"speaker\n": 1}, KNOWN, "message 2") == ([], ["'speaker\\n'"])


def test_key_without_a_value_is_absent():
    assert unknown_keys({"images": [], "objects": {}, "rejected_response": ""}, KNOWN, "message 2") == ([], [])
    assert unknown_keys({"chosen": None, "mesages": None, "speaker": None}, KNOWN, "message 2") == ([], [])


@pytest.mark.parametrize(
    ("user", "answer", "fault"),
    [
        (
            {},
            {"text": "yes", "train": False},
            "message 2, part 1: the key `train` .* write `loss` true or false for the",
        ),
        ({}, {"text": "yes", "weight": 0}, "message 2, part 1: the key `weight` is not supported"),
        ({"audio": "a.wav"}, {"text": "yes"}, "message 1: the key `audio` is not supported: write .* list `content`"),
        ({"audios": ["a.wav"]}, {"text": "yes"}, "message 1: the key `audios` is not supported"),
    ],
)
def test_known_key_that_stands_in_the_wrong_place_is_a_fault(tmp_path, user, answer, fault):
    messages = [{"role": "user", "content": "What?", **user}, {"role": "assistant", "content": [answer]}]
    with pytest.raises(DataError, match=fault):
        parse_dialogue({"messages": messages}, "a.jsonl:1", tmp_path)


@pytest.mark.parametrize("key", ["begin", "start_time", "start_ms", "frame_offset", "channel_id"])
def test_stretch_in_words_that_are_not_read_is_a_fault(tmp_path, key):
    """It was noted as unused, and the whole file was learned."""
    part = {"type": "audio", "audio": "a.wav", key: 1, "end": 2}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(
        DataError, match=f"message 1, part 1: the key `{key}` is not supported: (give the stretch|write `ch)"
    ):
        parse_dialogue({"messages": messages}, "a.jsonl:1", tmp_path)
