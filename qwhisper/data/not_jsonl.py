"""Recognises other files given instead of JSONL, by their first bytes."""

import csv
import json
import re
from pathlib import Path

FIRST_BYTES = 2**16
WITH_DATASETS = "python -c \"from datasets import Dataset; Dataset.from_{0}('{1}').to_json('data.jsonl')\""
WITH_PANDAS = (
    "python -c \"import pandas; pandas.read_feather('{0}').to_json('data.jsonl', orient='records', lines=True)\""
)
COLUMN = re.compile(r"\w[\w .-]{0,30}")
UNPACK = "unpack it and give the JSONL file in it"
AUDIO = "give a JSONL file that names it, as in docs/data.md"
SIGNATURES = (  # offset of the bytes, the bytes, what the file is, what to do
    (0, b"PAR1", "a Parquet file", "convert it: " + WITH_DATASETS.format("parquet", "{path}")),
    (0, b"ARROW1", "an Arrow file", "convert it: " + WITH_PANDAS.format("{path}")),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", "convert it: " + WITH_DATASETS.format("file", "{path}")),
    (0, b"\x1f\x8b", "a gzip file", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard file", UNPACK),
    (0, b"BZh", "a bzip2 file", UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz file", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip file", UNPACK),
    (0, b"Rar!", "a RAR file", UNPACK),
    (257, b"ustar", "a tar file", UNPACK),
    (0, b"SQLite format 3", "an SQLite database", "export its rows as JSONL"),
    (0, b"\x89HDF", "an HDF5 file", "export its rows as JSONL"),
    (0, b"\x93NUMPY", "a NumPy array", "give a JSONL file of dialogues"),
    (0, b"%PDF", "a PDF file", "give a JSONL file of dialogues"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office file", "export it as JSONL"),
    (8, b"WAVE", "a WAV file", AUDIO),
    (0, b"fLaC", "a FLAC file", AUDIO),
    (0, b"OggS", "an Ogg file", AUDIO),
    (0, b"ID3", "an MP3 file", AUDIO),
    (0, b"\xff\xfb", "an MP3 file", AUDIO),
    (0, b"\xff\xf3", "an MP3 file", AUDIO),
    (4, b"ftyp", "an MP4 file", AUDIO),
    (0, b"\xff\xfe", "text in UTF-16", "save the file as UTF-8"),
    (0, b"\xfe\xff", "text in UTF-16", "save the file as UTF-8"),
)


def not_json_lines(path: Path) -> str | None:
    """What a file is instead of JSONL and what to do, as in "a Parquet file, not JSONL: …"; None if it may be JSONL.

    A file with a fault in its first lines may still be JSONL: the reader names the fault.
    """
    with open(path, "rb") as file:
        start = file.read(FIRST_BYTES)
    if start.startswith(b"PK\x03\x04"):
        is_workbook = b"[Content_Types].xml" in start or b"xl/" in start
        what, act = ("an Excel file", "export it as JSONL") if is_workbook else ("a ZIP file", UNPACK)
        return f"{what}, not JSONL: {act}"
    for offset, magic, what, act in SIGNATURES:
        if start[offset:].startswith(magic):
            return f"{what}, not JSONL: {act.replace('{path}', path.name)}"
    return _other_text(start.decode("utf-8-sig", errors="replace").lstrip(), path.name)


def _other_text(text: str, name: str) -> str | None:
    first_line, _, rest = text.partition("\n")
    second_line = rest.lstrip().partition("\n")[0]
    one_a_line = "not JSONL: write one object a line, with: jq -c"
    if text.startswith("["):
        return f"a JSON array, {one_a_line} '.[]' {name} > data.jsonl"
    if text.startswith("{") and _goes_on(first_line) and not second_line.startswith("{"):
        return f"JSON over several lines, {one_a_line} . {name} > data.jsonl"
    if text.startswith("<"):
        return "HTML or XML, not JSONL: perhaps the page of a download that failed; give a JSONL file of dialogues"
    for delimiter, what in ((",", "CSV"), ("\t", "tab-separated values")):
        header = _fields(first_line.strip(), delimiter)
        if len(header) > 1 and all(COLUMN.fullmatch(word) for word in header):
            return f"{what}, not JSONL: write an object with `messages` for each row"
    return None


def _fields(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:  # as with old Mac line breaks
        return []


def _goes_on(line: str) -> bool:
    """Whether it is the first of several lines of one JSON value: it ends before a value or a name."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip()) and line.rstrip().endswith((",", "[", "{", ":"))
    except (ValueError, RecursionError):  # an integer of more than 4300 digits; too deep
        pass
    return False
