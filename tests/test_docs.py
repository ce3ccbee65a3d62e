"""The documentation says what the code does: flag tables, commands, recipes, links between its files."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from qwhisper import cli
from qwhisper.cli import VERBS
from qwhisper.parsing import parse, shipped_recipes

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")


@pytest.fixture(scope="module")
def table():
    """The module docs/make_flag_table.py."""
    spec = importlib.util.spec_from_file_location("make_flag_table", ROOT / "docs" / "make_flag_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def first_two_columns(text):
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `--")]
    return [(row[0], row[1]) for row in rows]


def test_flag_table_of_the_readme_is_the_one_of_the_code(table):
    assert table.between_marks(read("README.md")) == table.flag_table(), "run: python docs/make_flag_table.py"


def test_chinese_flag_table_has_the_same_flags_and_defaults(table):
    chinese = table.between_marks(read("README.zh-CN.md"))
    assert first_two_columns(chinese) == first_two_columns(table.flag_table())


def commands(name):
    blocks = re.findall(r"```bash\n(.*?)```", read(name), flags=re.DOTALL)
    words = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line[1:] for line in words if line[:1] == ["qwhisper"]]


def test_both_readmes_show_the_same_commands():
    assert commands(READMES[0]) == commands(READMES[1])
    assert len(commands(READMES[0])) >= 8


@pytest.mark.parametrize("argv", commands("README.md"), ids=" ".join)
def test_commands_of_the_readme_parse(argv, tmp_path):
    (tmp_path / "config.yaml").write_text("train_file: data.jsonl\noutput_dir: run\n", encoding="utf-8")
    argv = [str(tmp_path / "config.yaml") if word == "run/config.yaml" else word for word in argv]
    name = next(name for name in VERBS if argv[: len(name.split())] == name.split())
    assert parse(name, VERBS[name], cli.load(VERBS[name].arguments), argv[len(name.split()) :]) is not None


@pytest.mark.parametrize("name", READMES)
def test_every_recipe_is_named(name):
    assert all(f"`{recipe}`" in read(name) for recipe in shipped_recipes())


@pytest.mark.parametrize("name", [*READMES, "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_within_the_repository_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", read(name))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_both_readmes_cite_the_same_sources():
    sources = [re.findall(r"\]\((https?://[^)]+)\)", read(name)) for name in READMES]
    assert sources[0] == sources[1]


def test_every_room_of_the_architecture_exists():
    rooms = set(re.findall(r"`qwhisper/(\w+)/`", read("ARCHITECTURE.md")))
    packages = {path.parent.name for path in (ROOT / "qwhisper").glob("*/__init__.py")}
    assert packages <= rooms
