"""The pool of instructions, and which of it a bare line of audio and transcript is given."""

import re

import pytest

from qwhisper.data.audio_marks import ANY_MARK
from qwhisper.data.instructions import (
    LANGUAGES,
    POOLS,
    as_question,
    instruction_pool,
    read_instructions,
)
from qwhisper.errors import UsageError

CHINESE = re.compile(r"[\u4e00-\u9fff]")
POOL = ["one", "two", "three", "four", ""]


def bare(n: int, **more) -> dict:
    return {"audio": f"{n}.wav", "transcript": f"words {n}", **more}


def test_other_keys_of_a_bare_line_stay_where_the_reader_finds_them():
    record = as_question(bare(1, id="a", speaker="b", channel=1, loss=False, kind="c"), POOL, 0)
    assert {key: value for key, value in record.items() if key != "messages"} == {
        "id": "a",
        "speaker": "b",
        "loss": False,
    }
    assert record["messages"][0]["content"][0] == {"type": "audio", **bare(1), "channel": 1}


def instruction_of(record: dict) -> str:
    clip, *texts = record["messages"][0]["content"]
    assert clip["type"] == "audio" and len(texts) <= 1
    return texts[0]["text"] if texts else ""


@pytest.mark.parametrize("language", LANGUAGES)
def test_shipped_lines_are_many_unique_not_blank_and_of_their_language(language):
    lines = (POOLS / f"{language}.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 60 and len(set(lines)) == len(lines)
    assert all(line and line == line.strip() for line in lines)
    pool = instruction_pool(language)
    assert len(pool) == len(lines) and pool.count("") == 1
    assert all(bool(CHINESE.search(line)) == (language == "zh") for line in pool if line)
    assert not any(ANY_MARK.search(line) for line in pool)


def test_both_languages_together_hold_each_line_once():
    both = instruction_pool()
    assert set(both) == set(instruction_pool("en")) | set(instruction_pool("zh"))
    assert len(set(both)) == len(both)


def test_a_file_of_ones_own_is_read_without_blank_lines_and_repetitions(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes('\ufeffSay it.\r\n\r\n  ""\nSay it.\n再说一遍。\n'.encode())
    assert read_instructions(path) == ["Say it.", "", "再说一遍。"]


@pytest.mark.parametrize(("content", "reason"), [(None, "does not exist"), (b" \n", "no instr"), (b"\xff", "UTF-8")])
def test_what_is_wrong_with_a_file_of_ones_own_is_said(tmp_path, content, reason):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        read_instructions(path)


def test_a_bare_line_becomes_a_question_about_its_audio():
    line = bare(1, id="a", start=0.5, end=2, kind="open")
    assert as_question(line, ["Why?"], 0) == {
        "id": "a",
        "messages": [
            {
                "role": "user",
                "kind": "open",
                "content": [
                    {"type": "audio", "audio": "1.wav", "start": 0.5, "end": 2, "transcript": "words 1"},
                    {"type": "text", "text": "Why?"},
                ],
            }
        ],
    }
    assert [part["type"] for part in as_question(bare(1), [""], 0)["messages"][0]["content"]] == ["audio"]


def test_other_lines_are_left_alone():
    for record in ({"messages": []}, {"messages": [], "audio": "a.wav"}, {"text": "x"}):
        assert as_question(record, POOL, 0) is record


def test_a_lines_instruction_hangs_on_the_line_and_the_seed_alone():
    lines = [bare(n) for n in range(200)]
    drawn = [instruction_of(as_question(line, POOL, 0)) for line in lines]
    backwards = [instruction_of(as_question(dict(reversed(line.items())), POOL, 0)) for line in reversed(lines)]
    assert drawn == backwards[::-1]
    assert drawn != [instruction_of(as_question(line, POOL, 1)) for line in lines]
    # 40 of each are expected; 5 standard deviations of a binomial distribution are 28.
    assert all(12 <= drawn.count(instruction) <= 68 for instruction in POOL)
