"""Scores of answers against references: exact match, word and character error rates, and a guesser to compare with.

Plain text in, numbers out; no model. docs/learning.md says what a score does not count.
"""

import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import jiwer
import regex

FINAL_PUNCTUATION = ".,;:!?。、।॥؟،؛۔։።။។"  # after `_compatible`, which turns full-width ones into ASCII
AT_END = regex.compile(rf"[\s\x1c-\x1f{FINAL_PUNCTUATION}]+\Z")  # white space as `str.strip` knows it
# Neither heard nor seen: joiners, direction marks, soft hyphens, and selectors of a character's glyph.
INVISIBLE = regex.compile(r"[\p{Cf}\ufe00-\ufe0f\U000e0100-\U000e01ef]")
RAISED = ("<super>", "<sub>")
# A letter with its marks, in scripts without spaces between words: Chinese characters, kana, Thai, Lao, Khmer, Burmese.
UNSPACED = regex.compile(
    r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]\p{M}*)"
)
# Only categories P and S: a mark (M) is a vowel or a tone in most scripts of India, in Thai and in Hebrew.
OUTER_PUNCTUATION = regex.compile(r"(?<![^\s\p{P}\p{S}])[\p{P}\p{S}]+|[\p{P}\p{S}]+(?![^\s\p{P}\p{S}])")


def normalise(text: str) -> str:
    """The text that exact match compares: NFKC except for raised digits, without case, invisible characters, final
    punctuation and surrounding white space.

    A text of punctuation alone stays as it is.
    """
    text = _compatible(_compatible(INVISIBLE.sub("", text)).casefold()).strip()
    return AT_END.sub("", text) or text


def _compatible(text: str) -> str:
    """NFKC, but 10² does not become 102. The final NFC joins a character and its marks if Unicode has one for both."""
    return unicodedata.normalize("NFC", "".join(map(_compatible_character, unicodedata.normalize("NFC", text))))


def _compatible_character(character: str) -> str:
    is_raised = unicodedata.decomposition(character).startswith(RAISED)
    return character if is_raised else unicodedata.normalize("NFKC", character)


def same(reference: str, answer: str) -> bool:
    return normalise(reference) == normalise(answer)


def words(text: str) -> list[str]:
    """The words that error rates count; each letter of a script without spaces, with its marks, is a word.

    Punctuation and symbols count only inside a word ("3.5", "it's").
    """
    return OUTER_PUNCTUATION.sub(" ", UNSPACED.sub(r" \1 ", normalise(text))).split()


def _characters(text: str) -> str:
    """The text that CER counts: one space between words, none beside a letter of a script without spaces."""
    joined, before = "", ""
    for word in words(text):
        glued = not joined or UNSPACED.fullmatch(word) or UNSPACED.fullmatch(before)
        joined += word if glued else f" {word}"
        before = word
    return joined


def word_error_rate(references: Sequence[str], answers: Sequence[str]) -> float:
    """Wrong, missing and additional words / words of all references. Chinese: equal to the character error rate."""
    return _error_rate(jiwer.process_words, [[" ".join(words(t)) for t in texts] for texts in (references, answers)])


def character_error_rate(references: Sequence[str], answers: Sequence[str]) -> float:
    """Wrong, missing and additional characters / characters of all references; marks and spaces between words count."""
    return _error_rate(jiwer.process_characters, [[_characters(t) for t in texts] for texts in (references, answers)])


def _error_rate(process, texts: list[list[str]]) -> float:
    """Errors / units of the references; if the references are empty, the number of errors."""
    if not texts[0]:
        return 0.0
    # jiwer's rate for empty references is 1 for any number of errors.
    counts = process(*texts)
    errors = counts.substitutions + counts.deletions + counts.insertions
    return errors / max(1, counts.hits + counts.substitutions + counts.deletions)


def share(outcomes: Iterable[bool]) -> float | None:
    """The share of outcomes that are true; None without any."""
    outcomes = list(outcomes)
    return sum(outcomes) / len(outcomes) if outcomes else None


def majority_share(references: Iterable[str]) -> float | None:
    """The score of always giving the most frequent reference."""
    counts = Counter(normalise(reference) for reference in references)
    return max(counts.values()) / counts.total() if counts else None


def majority_share_by_kind(kinds: Sequence[Hashable], references: Sequence[str]) -> float | None:
    """The score of a guesser that knows each question's kind and gives that kind's most frequent reference."""
    if not references:
        return None
    counts = Counter(zip(kinds, map(normalise, references), strict=True))
    best: Counter = Counter()
    for (kind, _), count in counts.items():
        best[kind] = max(best[kind], count)
    return best.total() / len(references)


def whole_dialogue_share(dialogues: Sequence[Hashable], right: Sequence[bool]) -> float | None:
    """The share of dialogues whose turns are all right. dialogues, right: one entry for each turn."""
    all_right: dict[Hashable, bool] = {}
    for dialogue, outcome in zip(dialogues, right, strict=True):
        all_right[dialogue] = all_right.get(dialogue, True) and outcome
    return share(all_right.values())
