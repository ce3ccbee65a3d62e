import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwhisper.evaluate.metrics import (
    character_error_rate,
    majority_share,
    majority_share_by_kind,
    normalise,
    same,
    share,
    whole_dialogue_share,
    word_error_rate,
    words,
)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("Seven.", " seven\n"),
        ("yes", "YES!?"),
        ("七。", "七"),
        ("７", "7"),  # full-width digit
        ("ＯＫ！", "ok"),
        ("Straße", "STRASSE"),
        ("ﬁve", "five"),  # a ligature
        ("3.5", "3.5."),
        ("…", "..."),
        ("نمی‌دانم", "نمیدانم"),  # a joiner between letters
        ("\u200fשלום", "שלום"),  # a direction mark
        ("नमस्ते।", "नमस्ते"),
        ("tiếng Việt", unicodedata.normalize("NFD", "tiếng Việt")),
        ("한국어", unicodedata.normalize("NFD", "한국어")),
        ("ｶﾞ", "ガ"),  # half width
    ],
)
def test_same_answer(reference, answer):
    assert same(reference, answer)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("seven", "eleven"),
        ("3.5", "35"),
        ("50%", "50"),
        ("?", ""),
        ("no", "no no"),
        ("a b", "ab"),
        ("C++", "C"),
        ("七", "八"),
        ("का", "की"),
        ("ที่", "ที"),
        ("résumé", "resume"),
        ("10²", "102"),
        ("❤️", "❤️❤️"),
    ],
)
def test_another_answer(reference, answer):
    assert not same(reference, answer)


@given(st.text())
@example("0\r.")
@example("0.\x1f:")
def test_normalising_twice_is_normalising_once(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("references", "answers", "expected"),
    [
        (["the cat sat"], ["the cat sat"], 0.0),
        (["the cat sat"], ["The cat, sat."], 0.0),
        (["the cat sat"], ["the hat sat"], 1 / 3),
        (["the cat sat", "hello"], ["the cat", "hello you all"], 3 / 4),  # weighted by words, not by lines
        (["hello"], [""], 1.0),
        ([""], [""], 0.0),
        ([""], ["two words"], 2.0),
        (["", "one"], ["two words", "one"], 2.0),
        ([], [], 0.0),
        (["你好世界"], ["你好时界"], 1 / 4),
        (["你好，世界。"], ["你好 世界"], 0.0),
        (["我有 iPhone 手机"], ["我有 iphone 手"], 1 / 5),
    ],
)
def test_word_error_rate(references, answers, expected):
    assert word_error_rate(references, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("references", "answers", "expected"),
    [
        (["seven"], ["sever"], 1 / 5),
        (["a b"], ["ab"], 1 / 3),
        ([""], ["abc"], 3.0),
        (["abc"], [""], 1.0),
        ([""], [""], 0.0),
        ([], [], 0.0),
        (["今天天气很好"], ["今天天很好"], 1 / 6),
        (["今天 天气"], ["今天天气"], 0.0),
        (["今天"], ["昨夜晚"], 3 / 2),
    ],
)
def test_character_error_rate(references, answers, expected):
    assert character_error_rate(references, answers) == pytest.approx(expected)


@given(st.lists(st.text("零一二三四五六七八九", max_size=6), min_size=1, max_size=4), st.data())
def test_chinese_word_and_character_error_rates_agree(references, data):
    answers = [data.draw(st.text("零一二三四五六七八九", max_size=6)) for _ in references]
    assert word_error_rate(references, answers) == pytest.approx(character_error_rate(references, answers))


# Words with their marks, which are of category M in each of these: reference, answer, WER, CER.
@pytest.mark.parametrize(
    ("reference", "answer", "wer", "cer"),
    [
        ("राम का घर", "राम की घर", 1 / 3, 1 / 9),  # Devanagari: another vowel sign
        ("हिन्दी", "हिनदी", 1, 1 / 6),  # a virama that is missing
        ("আমি ভাত খাই", "আমা ভাত খাই", 1 / 3, 1 / 11),  # Bengali
        ("தமிழ் மொழி", "தமழ் மொழி", 1 / 2, 1 / 10),  # Tamil
        ("ที่", "ที", 1, 1 / 3),  # Thai: a tone mark; one letter with its marks
        ("น้ำ", "นำ", 1 / 2, 1 / 4),  # sara am is two characters after NFKC
        ("ភាសាខ្មែរ", "ភាសខ្មែរ", 1 / 5, 1 / 9),  # Khmer
        ("မြန်မာ", "မြန်မ", 1 / 3, 1 / 6),  # Burmese
        ("שָׁלוֹם עוֹלָם", "שָׁלוֹם עוֹלָם", 0, 0),  # pointed Hebrew: two words
        ("שָׁלוֹם עוֹלָם", "שָׁלוֹם עולם", 1 / 2, 2 / 14),
        ("كَتَبَ", "كُتِبَ", 1, 2 / 6),  # Arabic: he wrote, it was written
        ("e\u0301te\u0301", "été", 0, 0),  # what Unicode has a character for
        ("q\u0303a", "qa", 1, 1 / 3),  # and what it has none for
    ],
)
def test_combining_marks_are_part_of_their_word(reference, answer, wer, cer):
    assert word_error_rate([reference], [answer]) == pytest.approx(wer)
    assert character_error_rate([reference], [answer]) == pytest.approx(cer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("שָׁלוֹם", ["שָׁלוֹם"]),
        ("क्या? हाँ!", ["क्या", "हाँ"]),
        ("«مرحبا»، قال.", ["مرحبا", "قال"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("well-known don't", ["well-known", "don't"]),
        ("yes 👍🏽 ❤️ ☺️", ["yes"]),
        ("می‌خواهم", ["میخواهم"]),
        ("_yes_ “no”", ["yes", "no"]),
    ],
)
def test_only_punctuation_and_symbols_at_the_edges_of_words_are_dropped(text, expected):
    assert words(text) == [unicodedata.normalize("NFC", word) for word in expected]


def test_punctuation_counts_inside_words_alone():
    assert words('He said: "it\'s 3.5," twice!') == ["he", "said", "it's", "3.5", "twice"]


def test_shares():
    assert share([True, False, False, False]) == 0.25
    assert share([]) is None
    assert majority_share(["Yes", "no", "yes."]) == pytest.approx(2 / 3)
    assert majority_share([]) is None
    # "number" guesses seven (2 of 3), "even" guesses yes (1 of 2)
    kinds, references = ["number", "number", "number", "even", "even"], ["seven", "seven", "two", "yes", "no"]
    assert majority_share_by_kind(kinds, references) == pytest.approx(3 / 5)
    assert majority_share_by_kind([], []) is None


def test_dialogue_is_right_if_all_its_turns_are():
    assert whole_dialogue_share(["a", "a", "b", "c"], [True, False, True, True]) == pytest.approx(2 / 3)
    assert whole_dialogue_share([], []) is None
