"""Files that are no JSONL, as other programs write them."""

import gzip
import json
import tarfile
import zipfile

import pytest
import soundfile

from qwhisper.data.dialogue import read_dialogues, scan_dialogues
from qwhisper.errors import DataError
from tests.small import tone

RECORD = {"messages": [{"role": "user", "content": "Hi, you"}, {"role": "assistant", "content": "Hello"}]}
LINE = json.dumps(RECORD) + "\n"


def zipped(path, member: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, LINE)


def tarred(path) -> None:
    path.with_suffix(".inner").write_text(LINE)
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_suffix(".inner"), "data.jsonl")


FILES = {
    "Parquet": (lambda path: path.write_bytes(b"PAR1\x15\x04\x15 PAR1"), "a Parquet file, not JSONL: convert it"),
    "Arrow": (lambda path: path.write_bytes(b"ARROW1\0\0\xff\xff"), "an Arrow file, not JSONL: convert it"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(LINE.encode())), "a gzip file, not JSONL: unpack it"),
    "ZIP": (lambda path: zipped(path, "data.jsonl"), "a ZIP file, not JSONL: unpack it"),
    "Excel": (lambda path: zipped(path, "xl/workbook.xml"), "an Excel file, not JSONL"),
    "tar": (tarred, "a tar file, not JSONL: unpack it"),
    "PDF": (lambda path: path.write_bytes(b"%PDF-1.7\n"), "a PDF file, not JSONL"),
    "WAV": (lambda path: soundfile.write(path, tone(200, 0.1), 16_000, format="WAV"), "a WAV file, not JSONL"),
    "FLAC": (lambda path: soundfile.write(path, tone(200, 0.1), 16_000, format="FLAC"), "a FLAC file, not JSONL"),
    "MP3": (lambda path: soundfile.write(path, tone(200, 0.5), 16_000, format="MP3"), "an MP3 file, not JSONL"),
    "UTF-16": (
        lambda path: path.write_text(LINE, encoding="utf-16"),
        "text in UTF-16, not JSONL: save the file as UTF-8",
    ),
    "array": (lambda path: path.write_text(json.dumps([RECORD])), "a JSON array, not JSONL: write one object a line"),
    "indented array": (lambda path: path.write_text("\n" + json.dumps([RECORD], indent=1)), "a JSON array, not JSONL"),
    "indented": (lambda path: path.write_text(json.dumps(RECORD, indent=2)), "JSON over several lines, not JSONL"),
    "CSV": (lambda path: path.write_text("id,audio,text\n1,a.wav,low\n"), "CSV, not JSONL"),
    "TSV": (lambda path: path.write_text("id\taudio path\n1\ta.wav\n"), "tab-separated values, not JSONL"),
    "page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "HTML or XML, not JSONL"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_named_with_what_to_do(tmp_path, kind):
    write, wanted = FILES[kind]
    write(tmp_path / "data.jsonl")
    with pytest.raises(DataError) as error:
        read_dialogues(tmp_path / "data.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'data.jsonl'} is {wanted}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("start", ["", "\n", "\ufeff", "Hello, world\n", '{"messages": [\n', "plain\n"])
def test_a_jsonl_file_with_a_fault_is_read_line_by_line(tmp_path, start):
    path = tmp_path / "data.jsonl"
    path.write_text(start + LINE, encoding="utf-8")
    dialogues, faults = scan_dialogues(path)
    assert len(dialogues) == 1 and len(faults) == bool(start.strip("\n\ufeff"))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (LINE.strip() + "\r" + LINE, "two objects on one line"),
        (LINE.strip()[:-1] + ', "id": 1' + "0" * 5000 + "}", "not valid JSON .Exceeds the limit"),
    ],
)
def test_odd_lines_are_faults_of_their_line(tmp_path, content, fault):
    (tmp_path / "data.jsonl").write_bytes(content.encode())
    with pytest.raises(DataError, match=rf"data.jsonl:1: {fault}"):
        read_dialogues(tmp_path / "data.jsonl")
