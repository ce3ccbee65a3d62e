"""How the package is laid out. The layers and what an export ships are contracts of import-linter (`make lint`)."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qwhisper"
MAX_LINES = 400


def test_no_source_file_is_longer_than_400_lines():
    root = PACKAGE.parent
    files = [file for folder in ("qwhisper", "tests", "benchmarks", "docs") for file in (root / folder).rglob("*.py")]
    lines = {str(file.relative_to(root)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert "qwhisper/cli.py" in lines
    assert {file: n for file, n in lines.items() if n > MAX_LINES} == {}


# import-linter sees no import of a module by its name. The command line finds a verb so; the package its exports, which
# stand beside it as imports under TYPE_CHECKING; the third imports modules of transformers.
BY_NAME = {"cli.py", "__init__.py", "auto_classes.py"}


def test_modules_are_imported_by_their_names_where_the_linter_need_not_see_it():
    by_name = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if re.search(r"import_module|__import__", file.read_text("utf-8"))
    }
    assert by_name == BY_NAME


STORIES = {"A line of data to the weights": 12, "A checkpoint to an answer": 7}  # and the most files of each
HOP = re.compile(r"^\d+\. \[.+?\]\((\S+)\),\s+called\s+by\s+\[.+?\]\((\S+)\)", re.MULTILINE)


def imported(file: Path) -> set[str]:
    """Modules that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("story", STORIES)
def test_each_file_of_a_story_in_the_architecture_is_imported_by_the_one_that_calls_it(story):
    page = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    steps = re.split(r"\n(?!\d+\.|   |\n)", page.split(f"{story}:\n")[1])[0]
    hops = HOP.findall(steps)
    assert 1 < len(hops) == len(re.findall(r"^\d+\. ", steps, re.MULTILINE))
    assert {link for hop in hops for link in hop} == set(re.findall(r"\]\((\S+)\)", steps))
    named = [hops[0][1]]
    for file, caller in hops:
        assert caller in named and file not in named
        named.append(file)
        module = file.removesuffix(".py").replace("/", ".")
        assert module in imported(PACKAGE.parent / caller), f"{caller} does not import {file}"
    assert len(named) <= STORIES[story]
