"""Sentences about a file's faults, for people: equal ones as one line."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

SHOWN_PLACES = 3
PLACE = re.compile(r"(?P<place>.+?:\d+): (?P<fault>.+)", re.DOTALL)
# What may differ between faults of one kind: ids, file names, paths up to the colon behind them, and numbers. Other
# quoted words, such as an unknown key, are what the fault is about.
PARTICULAR = re.compile(
    r"(?<=\bid )(?:'[^']*'|\"[^\"]*\")|'[^']*[./][^']*'|\"[^\"]*[./][^\"]*\"|/.*?(?=: )|/\S+|\d[\d.e+-]*"
)


def grouped(sentences: Iterable[str]) -> list[str]:
    """A line for every kind of fault, the most frequent first; up to 3 equal ones have a line each.

    sentences: `file:line: fault`, all of one file.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for sentence in sentences:
        kinds[PARTICULAR.sub("#", _parts(sentence)[1])].append(sentence)
    by_number = sorted(kinds.values(), key=len, reverse=True)  # stable: equally many in the order of the file
    return [line for alike in by_number for line in (alike if len(alike) <= SHOWN_PLACES else [_line(alike)])]


def _line(alike: Sequence[str]) -> str:
    first, *others = (_parts(sentence)[0] for sentence in alike[:SHOWN_PLACES])
    lines = "".join(f", {place.rpartition(':')[2]}" for place in others)
    return f"{first}{lines} and {len(alike) - SHOWN_PLACES} more: {_parts(alike[0])[1]}"


def _parts(sentence: str) -> tuple[str, str]:
    found = PLACE.fullmatch(sentence)
    return (found["place"], found["fault"]) if found else ("", sentence)
