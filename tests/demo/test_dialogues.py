from collections import Counter, defaultdict

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from qwhisper.data.dialogue import read_dialogues
from qwhisper.demo.dialogues import (
    NUMBERS,
    QUESTIONS,
    SCRIPTS,
    Clip,
    answer,
    answers,
    draw_numbers,
    hangs_on_hearing,
    spoken_dialogues,
    swap_numbers,
    text_dialogues,
    write_jsonl,
)

CLIPS = [Clip(f"clips/{n}.wav", NUMBERS[n % 10]) for n in range(60)]


@pytest.mark.parametrize(
    ("kind", "heard", "right"),
    [
        ("number", "four nine", "nine"),
        ("even", "three eight", "yes"),
        ("even", "eight three", "no"),
        ("bigger", "six", "yes"),
        ("bigger", "five", "no"),
        ("last", "one two three", "three"),
        ("first", "one two", "one"),
        ("sum", "seven nine", "sixteen"),
        ("sum", "zero nine", "nine"),
        ("rising", "two seven", "yes"),
        ("rising", "two two", "no"),
        ("earlier_number", "six", "six"),
        ("earlier_first", "four five", "four"),
        ("earlier_sum", "one nine nine", "eighteen"),
        ("earlier_rising", "nine one", "no"),
        ("earliest", "zero one two", "zero"),
    ],
)
def test_the_right_answer_follows_from_what_was_heard(kind, heard, right):
    assert answer(kind, heard.split()) == right


def test_every_kind_of_question_occurs():
    assert {kind for script in SCRIPTS for kind, _ in script} == set(QUESTIONS)


@pytest.mark.parametrize(
    ("script", "heard", "open_to_the_deaf"),
    [
        ((("last", 2), ("earlier_first", 0)), "four seven", False),
        ((("number", 1), ("earlier_number", 0)), "four", True),  # the first answer says it
        ((("first", 2), ("earlier_first", 0)), "four seven", True),
        ((("bigger", 1), ("earlier_rising", 1)), "four zero", True),  # nothing is less than zero
        ((("bigger", 1), ("earlier_rising", 1)), "four three", False),
        ((("bigger", 1), ("earlier_sum", 1), ("earliest", 0)), "nine nine", True),  # only 9 + 9 is 18
        ((("bigger", 1), ("earlier_sum", 1), ("earliest", 0)), "nine eight", False),
    ],
)
def test_answers_that_the_history_gives_away_are_found(script, heard, open_to_the_deaf):
    assert hangs_on_hearing(script, tuple(heard.split())) is not open_to_the_deaf


@given(st.sampled_from(SCRIPTS), st.integers(0, 2**32 - 1))
def test_swapped_numbers_make_every_answer_wrong(script, seed):
    generator = np.random.default_rng(seed)
    heard = draw_numbers(script, generator)
    swapped = swap_numbers(script, heard, generator)

    assert len(swapped) == len(heard)
    assert all(a != b for a, b in zip(answers(script, heard), answers(script, swapped), strict=True))


def test_who_reads_but_does_not_hear_can_only_guess():
    """The best guess from questions and earlier answers, learned on half of the dialogues, is poor on the others."""
    seen: dict[tuple, Counter] = defaultdict(Counter)
    hits: dict[str, list[bool]] = defaultdict(list)
    for half, records in enumerate(spoken_dialogues(CLIPS, 1360, "x", seed)[0] for seed in (0, 1)):
        for record in records:
            history: list[str] = []
            for turn in record["messages"]:
                if turn["role"] == "user":
                    history.append(str([part.get("text") for part in turn["content"]]))
                    continue
                if half:
                    guess = seen[tuple(history)].most_common(1)
                    hits[turn["kind"]].append(bool(guess) and guess[0][0] == turn["content"])
                else:
                    seen[tuple(history)][turn["content"]] += 1
                history.append(turn["content"])

    yes_or_no = {"even", "bigger", "rising", "earlier_rising"}
    assert set(hits) == set(QUESTIONS)
    for kind, right in hits.items():
        assert np.mean(right) < (0.6 if kind in yes_or_no else 0.3), kind


def test_yes_and_no_are_equally_likely_and_numbers_spread():
    said: dict[str, Counter] = defaultdict(Counter)
    for record in spoken_dialogues(CLIPS, 1700, "x", 0)[0]:
        for turn in record["messages"][1::2]:
            said[turn["kind"]][turn["content"]] += 1
    for kind in ("even", "bigger", "rising", "earlier_rising"):
        assert said[kind]["yes"] / said[kind].total() == pytest.approx(0.5, abs=0.1), kind
    assert max(said["number"].values()) / said["number"].total() < 0.15


def test_swapped_dialogues_differ_in_their_clips_alone():
    true, swapped = spoken_dialogues(CLIPS, 170, "eval", 3)
    for original, other in zip(true, swapped, strict=True):
        heard, instead = [], []
        for turn, changed in zip(original["messages"], other["messages"], strict=True):
            if turn["role"] == "assistant":
                assert changed == turn
                assert answer(turn["kind"], heard) == turn["content"] != answer(turn["kind"], instead)
                continue
            heard += [part["transcript"] for part in turn["content"] if part["type"] == "audio"]
            instead += [part["transcript"] for part in changed["content"] if part["type"] == "audio"]
            assert [p for p in turn["content"] if p["type"] == "text"] == [
                p for p in changed["content"] if p["type"] == "text"
            ]


def test_clips_are_used_equally_often_and_only_for_their_word():
    word = {clip.path: clip.word for clip in CLIPS}
    used = Counter()
    for record in spoken_dialogues(CLIPS, 340, "x", 0)[0]:
        for turn in record["messages"][::2]:
            for part in turn["content"][:-1]:
                assert part["transcript"] == word[part["audio"]]
                used[part["audio"]] += 1
    for number in NUMBERS:
        counts = [used[clip.path] for clip in CLIPS if clip.word == number]
        assert max(counts) - min(counts) <= 1


def test_the_written_file_is_canonical(tmp_path):
    (tmp_path / "clips").mkdir()
    for clip in CLIPS:
        soundfile.write(tmp_path / clip.path, np.zeros(1600), 16_000)
    records, _ = spoken_dialogues(CLIPS, len(SCRIPTS), "train", 0)
    dialogues = read_dialogues(write_jsonl(tmp_path / "train.jsonl", records))

    assert [c.id for c in dialogues] == [record["id"] for record in records]
    for dialogue, script in zip(dialogues, SCRIPTS, strict=True):
        assert tuple(m.kind for m in dialogue.messages if m.role == "assistant") == tuple(kind for kind, _ in script)
        assert [len(m.clips) for m in dialogue.messages if m.role == "user"] == [clips for _, clips in script]
        assert all(clip.transcript in NUMBERS for clip in dialogue.clips)


def test_text_dialogues_say_the_same_in_words():
    records = text_dialogues(310, 0)
    assert records == text_dialogues(310, 0) != text_dialogues(310, 1)
    for record in records:
        heard: list[str] = []
        for turn in record["messages"]:
            if turn["role"] == "user":
                assert all(part["type"] == "text" for part in turn["content"])
                heard += [part["text"].strip() for part in turn["content"][:-1]]
            else:
                assert turn["content"] == answer(turn["kind"], heard)
