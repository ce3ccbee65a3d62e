"""Generated tables in pages: each stands between two comments with its name, and only what is between is written."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """Markdown; head: the columns' titles, with " | " between them."""
    columns = head.count(" | ") + 1
    lines = ["| " + " | ".join(map(shown, row)) + " |" for row in rows]
    return "\n".join([f"| {head} |", "|" + "---|" * columns, *lines])


def shown(value: object) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def between_marks(text: str, name: str) -> str:
    begin, end = _marks(name)
    return text.split(begin)[1].split(end)[0].strip()


def write_between_marks(page: Path, tables: Mapping[str, str]) -> None:
    """Puts each table of the page where its name stands."""
    text = page.read_text(encoding="utf-8")
    for name, made in tables.items():
        begin, end = _marks(name)
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{made}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def write_in_each_language(
    pages: Mapping[str, Path],
    tables: Mapping[str, Callable[[dict[str, str]], str]],
    words: Mapping[str, dict[str, str]],
) -> None:
    """Writes each table into the page of each language, made with that language's words."""
    for language, page in pages.items():
        write_between_marks(page, {name: make(words[language]) for name, make in tables.items()})


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
