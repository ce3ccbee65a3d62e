"""Dialogues about spoken numbers that only listening can answer: as audio, as text, and with swapped clips.

A question's right answer is a function of the numbers heard so far, so it is known for any clips. No answer follows
from the text or from earlier answers, and a question about an earlier clip can't be answered from later ones:
`hangs_on_hearing` enumerates all other numbers that fit the same history.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SUMS = (
    *NUMBERS,
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)  # by value
BIG = 5  # what "bigger" asks about
VALUE = {word: value for value, word in enumerate(NUMBERS)}

# The questions of each kind.
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
# (kind, new clips) of each turn. A dialogue follows one of these scripts; all are equally frequent.
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
ABOUT_EARLIER_CLIPS = {"earlier_number", "earlier_first", "earlier_sum", "earlier_rising", "earliest"}
# A language model learns arithmetic most slowly. These scripts are three times as frequent in its training on text,
# which reduced 650 steps to 450.
HARD_KINDS = {"sum", "rising", "earlier_sum", "earlier_rising"}
TEXT_SCRIPTS = SCRIPTS + 2 * tuple(script for script in SCRIPTS if HARD_KINDS & {kind for kind, _ in script})

Turn = tuple[str, int]
Script = tuple[Turn, ...]


@dataclass(frozen=True)
class Clip:
    """A recording of one number. path: as written into the JSONL file."""

    path: str
    word: str


def answer(kind: str, heard: Sequence[str]) -> str:
    """The right answer to a question of this kind; heard: all numbers of the dialogue so far, in words and in order."""
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


@cache
def _possible(script: Script) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """(numbers, answers) of every possible dialogue of this script."""
    numbers = itertools.product(NUMBERS, repeat=sum(clips for _, clips in script))
    return tuple((heard, answers(script, heard)) for heard in numbers)


@cache
def hangs_on_hearing(script: Script, heard: tuple[str, ...]) -> bool:
    """Whether no answer follows from the questions and earlier answers alone, and no answer about an earlier clip from
    this turn's clips either."""
    given = answers(script, heard)
    end = 0
    for turn, (kind, clips) in enumerate(script):
        begin, end = end, end + clips
        fitting = [(h, a[turn]) for h, a in _possible(script[: turn + 1]) if a[:turn] == given[:turn]]
        if kind in ABOUT_EARLIER_CLIPS:
            fitting = [(h, a) for h, a in fitting if h[begin:end] == heard[begin:end]]
        if len({a for _, a in fitting}) < 2:
            return False
    return True


def draw_numbers(script: Script, generator: np.random.Generator) -> tuple[str, ...]:
    """Numbers for a script's clips, such that yes and no are equally likely and `hangs_on_hearing` holds."""
    yes_or_no = ("yes", "no")
    wanted = [yes_or_no[generator.integers(2)] for _ in script]
    while True:
        heard = tuple(NUMBERS[i] for i in generator.integers(len(NUMBERS), size=sum(clips for _, clips in script)))
        given = answers(script, heard)
        balanced = all(a == w for a, w in zip(given, wanted, strict=True) if a in yes_or_no)
        if balanced and hangs_on_hearing(script, heard):
            return heard


def swap_numbers(script: Script, heard: tuple[str, ...], generator: np.random.Generator) -> tuple[str, ...]:
    """Other numbers for the same script, with another right answer in every turn."""
    given = answers(script, heard)
    others = [h for h, a in _possible(script) if all(x != y for x, y in zip(a, given, strict=True))]
    return others[generator.integers(len(others))]


def messages(script: Script, heard: Sequence[str], parts: Iterable[dict], generator: np.random.Generator) -> list[dict]:
    """A dialogue in canonical form. parts: an audio part or a text part for each clip, in order."""
    parts = iter(parts)
    turns = []
    for (kind, clips), reply in zip(script, answers(script, heard), strict=True):
        question = QUESTIONS[kind][generator.integers(len(QUESTIONS[kind]))]
        content = [*itertools.islice(parts, clips), {"type": "text", "text": question}]
        turns.append({"role": "user", "content": content})
        turns.append({"role": "assistant", "content": reply, "kind": kind})
    return turns


def text_dialogues(num_dialogues: int, seed: int) -> list[dict]:
    """Dialogues with the words as text instead of clips, to teach a language model the skill itself."""
    generator = np.random.default_rng(seed)
    records = []
    for index in range(num_dialogues):
        script = TEXT_SCRIPTS[index % len(TEXT_SCRIPTS)]
        heard = draw_numbers(script, generator)
        parts = [{"type": "text", "text": f"{word} "} for word in heard]
        records.append({"id": f"text-{index:05d}", "messages": messages(script, heard, parts, generator)})
    return records


def spoken_dialogues(clips: Sequence[Clip], num_dialogues: int, name: str, seed: int) -> tuple[list[dict], list[dict]]:
    """(dialogues, the same with swapped clips), in canonical form.

    A swapped dialogue has the questions and answers of its original, but clips that make all of these answers wrong: a
    model that answers as before has not listened. Every clip is used about equally often.
    """
    generator = np.random.default_rng(seed)
    decks, others = ({w: _Deck([c for c in clips if c.word == w], generator) for w in NUMBERS} for _ in range(2))
    true, swapped = [], []
    for index in range(num_dialogues):
        script = SCRIPTS[index % len(SCRIPTS)]
        heard = draw_numbers(script, generator)
        turns = messages(script, heard, [decks[word].part() for word in heard], generator)
        instead = [others[word].part() for word in swap_numbers(script, heard, generator)]
        true.append({"id": f"{name}-{index:05d}", "messages": turns})
        swapped.append({"id": f"{name}-{index:05d}", "messages": _replace_clips(turns, instead)})
    return true, swapped


class _Deck:
    """One word's clips in random order, shuffled again when all have been used."""

    def __init__(self, clips: list[Clip], generator: np.random.Generator):
        self._clips, self._generator = clips, generator
        self._order: list[int] = []

    def part(self) -> dict:
        if not self._order:
            self._order = self._generator.permutation(len(self._clips)).tolist()
        clip = self._clips[self._order.pop()]
        return {"type": "audio", "audio": clip.path, "transcript": clip.word}


def _replace_clips(turns: list[dict], clips: list[dict]) -> list[dict]:
    rest = iter(clips)
    replaced = []
    for turn in turns:
        if turn["role"] == "user":
            turn = turn | {"content": [next(rest) if part["type"] == "audio" else part for part in turn["content"]]}
        replaced.append(turn)
    return replaced


def write_jsonl(path: str | Path, records: Iterable[dict]) -> Path:
    """Write one record a line, UTF-8; make the folder if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
