"""Dialogues about spoken numbers, whose answers can be had by listening alone: as audio, as text, and with swapped clips.

A question's right answer is a function of the numbers heard so far, so it is known for any clips that are put in. No answer
follows from the text or from the answers before it, and a question about an earlier clip can't be answered from the
later ones: `hangs_on_hearing` enumerates all other numbers that fit the same history, and `draw_dialogue` rejects what fails.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SUMS = (
    *NUMBERS,
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)  # by value
BIG = 5  # what "bigger" asks about
VALUE = {word: value for value, word in enumerate(NUMBERS)}

# The questions of each kind. "earlier_": about a clip of an earlier turn.
QUESTIONS = {
    "number": ("Which number is it?", "What did I say?"),
    "even": ("Is it even?", "Is this an even number?"),
    "bigger": ("Is it bigger than five?", "Is that more than five?"),
    "last": ("Which came last?", "What was the last one?"),
    "first": ("Which came first?", "What was the first one?"),
    "sum": ("What is their sum?", "Add them up."),
    "rising": ("Is the last one bigger than the first?", "Do they go up?"),
    "earlier_number": ("Which number was it?", "And what was the number?"),
    "earlier_first": ("And which came first?", "And the first of them?"),
    "earlier_sum": ("Add it to the number before.", "What is it plus the number before?"),
    "earlier_rising": ("Is it bigger than the number before?", "Is it more than the one before?"),
    "earliest": ("What was the very first number?", "Which number did we begin with?"),
}
# (kind, new clips) of each turn; a dialogue follows one of them, each as often as the others.
SCRIPTS = (
    (("number", 1),),
    (("even", 1),),
    (("bigger", 1),),
    (("last", 2),),
    (("last", 3),),
    (("first", 2),),
    (("sum", 2),),
    (("rising", 2),),
    (("even", 1), ("earlier_number", 0)),
    (("bigger", 1), ("earlier_number", 0)),
    (("last", 2), ("earlier_first", 0)),
    (("even", 1), ("earlier_sum", 1)),
    (("bigger", 1), ("earlier_rising", 1)),
    (("number", 1), ("sum", 2)),
    (("even", 1), ("number", 1), ("earliest", 0)),
    (("bigger", 1), ("earlier_sum", 1), ("earliest", 0)),
    (("rising", 2), ("earlier_first", 0), ("number", 1)),
)
# Arithmetic takes a language model longest to learn; where it learns from text, these scripts come three times as often.
HARD_KINDS = {"sum", "rising", "earlier_sum", "earlier_rising"}
TEXT_SCRIPTS = SCRIPTS + 2 * tuple(script for script in SCRIPTS if HARD_KINDS & {kind for kind, _ in script})

Turn = tuple[str, int]
Script = tuple[Turn, ...]


@dataclass(frozen=True)
class Clip:
    """A recording of one number. path: as it is to stand in the JSONL file."""

    path: str
    word: str


def answer(kind: str, heard: Sequence[str]) -> str:
    """The right answer to a question of this kind, of all numbers (words) heard in the dialogue so far, in their order."""
    last, before = heard[-1], heard[-2] if len(heard) > 1 else None
    if kind in ("number", "last", "earlier_number"):
        return last
    if kind == "earliest":
        return heard[0]
    if kind == "even":
        return "yes" if VALUE[last] % 2 == 0 else "no"
    if kind == "bigger":
        return "yes" if VALUE[last] > BIG else "no"
    if before is None:
        raise ValueError(f"a question of kind {kind!r} needs two numbers, but only {list(heard)} was heard")
    if kind in ("first", "earlier_first"):
        return before
    if kind in ("sum", "earlier_sum"):
        return SUMS[VALUE[before] + VALUE[last]]
    if kind in ("rising", "earlier_rising"):
        return "yes" if VALUE[last] > VALUE[before] else "no"
    raise ValueError(f"unknown kind of question {kind!r}; known are {', '.join(QUESTIONS)}")


def answers(script: Script, heard: Sequence[str]) -> tuple[str, ...]:
    """The right answer of each turn; heard: all numbers of the dialogue."""
    ends = itertools.accumulate(clips for _, clips in script)
    return tuple(answer(kind, heard[:end]) for (kind, _), end in zip(script, ends, strict=True))


@lru_cache(maxsize=None)
def _possible(script: Script, words: tuple[str, ...]) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """(numbers, answers) of every dialogue that this script can become."""
    numbers = itertools.product(words, repeat=sum(clips for _, clips in script))
    return tuple((heard, answers(script, heard)) for heard in numbers)


@lru_cache(maxsize=None)
def hangs_on_hearing(script: Script, heard: tuple[str, ...], words: tuple[str, ...] = NUMBERS) -> bool:
    """Whether every answer is open to somebody who knows the questions and earlier answers but has not heard the clips,
    and every answer about an earlier clip also to somebody who heard this turn's own."""
    given = answers(script, heard)
    end = 0
    for turn, (kind, clips) in enumerate(script):
        begin, end = end, end + clips
        fitting = [(h, a) for h, a in _possible(script[: turn + 1], words) if a[:turn] == given[:turn]]
        if len({a[turn] for _, a in fitting}) < 2:
            return False
        own = heard[begin:end]
        if kind.startswith("earli") and len({a[turn] for h, a in fitting if h[begin:end] == own}) < 2:
            return False
    return True


def draw_numbers(script: Script, generator: np.random.Generator, words: tuple[str, ...] = NUMBERS) -> tuple[str, ...]:
    """Numbers for a script's clips, such that yes and no are equally likely and `hangs_on_hearing` holds."""
    wanted = [("yes", "no")[generator.integers(2)] for _ in script]
    while True:
        heard = tuple(words[i] for i in generator.integers(len(words), size=sum(clips for _, clips in script)))
        given = answers(script, heard)
        balanced = all(a == w for a, w in zip(given, wanted, strict=True) if a in ("yes", "no"))
        if balanced and hangs_on_hearing(script, heard, words) and swappable(script, heard, words):
            return heard


def swappable(script: Script, heard: tuple[str, ...], words: tuple[str, ...] = NUMBERS) -> bool:
    """Whether other numbers exist that change the answer of every turn."""
    given = answers(script, heard)
    return any(all(x != y for x, y in zip(a, given, strict=True)) for _, a in _possible(script, words))


def swap_numbers(
    script: Script, heard: tuple[str, ...], generator: np.random.Generator, words: tuple[str, ...] = NUMBERS
) -> tuple[str, ...]:
    """Other numbers for the same script, with another right answer in every turn."""
    given = answers(script, heard)
    others = [h for h, a in _possible(script, words) if all(x != y for x, y in zip(a, given, strict=True))]
    return others[generator.integers(len(others))]


def messages(script: Script, heard: Sequence[str], parts: Iterable[dict], generator: np.random.Generator) -> list[dict]:
    """A dialogue in canonical form. parts: what stands for each clip, in their order: an audio part or a text part."""
    parts = iter(parts)
    turns = []
    for (kind, clips), reply in zip(script, answers(script, heard), strict=True):
        question = QUESTIONS[kind][generator.integers(len(QUESTIONS[kind]))]
        content = [*itertools.islice(parts, clips), {"type": "text", "text": question}]
        turns.append({"role": "user", "content": content})
        turns.append({"role": "assistant", "content": reply, "kind": kind})
    return turns


def text_dialogues(num_dialogues: int, seed: int, words: tuple[str, ...] = NUMBERS) -> list[dict]:
    """Dialogues with the words written where the others have clips, to teach a language model the skill itself."""
    generator = np.random.default_rng(seed)
    records = []
    for index in range(num_dialogues):
        script = TEXT_SCRIPTS[index % len(TEXT_SCRIPTS)]
        heard = draw_numbers(script, generator, words)
        parts = [{"type": "text", "text": f"{word} "} for word in heard]
        records.append({"id": f"text-{index:05d}", "messages": messages(script, heard, parts, generator)})
    return records


def spoken_dialogues(clips: Sequence[Clip], num_dialogues: int, name: str, seed: int) -> tuple[list[dict], list[dict]]:
    """(dialogues, the same with swapped clips), in canonical form.

    A swapped dialogue has the questions and the answers of its original, but clips that make every one of those answers
    wrong: a model that answers as before has not listened. Every clip is used about equally often.
    """
    generator = np.random.default_rng(seed)
    words = tuple(word for word in NUMBERS if any(clip.word == word for clip in clips))
    decks = {word: _Deck([clip for clip in clips if clip.word == word], generator) for word in words}
    others = {word: _Deck([clip for clip in clips if clip.word == word], generator) for word in words}
    true, swapped = [], []
    for index in range(num_dialogues):
        script = SCRIPTS[index % len(SCRIPTS)]
        heard = draw_numbers(script, generator, words)
        record = {"id": f"{name}-{index:05d}", "messages": messages(script, heard, (decks[w].part() for w in heard), generator)}
        instead = swap_numbers(script, heard, generator, words)
        true.append(record)
        swapped.append({"id": record["id"], "messages": _replace_clips(record["messages"], [others[w].part() for w in instead])})
    return true, swapped


class _Deck:
    """One word's clips, dealt in random order and shuffled again when all have been dealt."""

    def __init__(self, clips: list[Clip], generator: np.random.Generator):
        self._clips, self._generator, self._order = clips, generator, []

    def part(self) -> dict:
        if not self._order:
            self._order = list(self._generator.permutation(len(self._clips)))
        clip = self._clips[self._order.pop()]
        return {"type": "audio", "audio": clip.path, "transcript": clip.word}


def _replace_clips(original: list[dict], parts: list[dict]) -> list[dict]:
    rest = iter(parts)
    return [
        {**m, "content": [next(rest) if p["type"] == "audio" else p for p in m["content"]]} if m["role"] == "user" else m
        for m in original
    ]


def write_jsonl(path: str | Path, records: Iterable[dict]) -> Path:
    """One record a line, UTF-8."""
    path = Path(path)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
