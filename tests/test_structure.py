"""How the package is laid out. The layers and what an export ships are contracts of import-linter (`make lint`)."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qwhisper"
MAX_LINES = 400


def test_no_source_file_is_longer_than_400_lines():
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in PACKAGE.rglob("*.py")}
    assert lines
    assert {str(file.relative_to(PACKAGE)): n for file, n in lines.items() if n > MAX_LINES} == {}
