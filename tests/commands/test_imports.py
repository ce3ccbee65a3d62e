"""What commands import, and who imports them."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwhisper.commands import VERBS

ROOT = Path(__file__).parents[2]
COMMAND_LINE = ("commands", "cli", "parsing", "__main__")
LIBRARIES = [
    path
    for path in sorted((ROOT / "qwhisper").rglob("*.py"))
    if path.relative_to(ROOT / "qwhisper").parts[0].removesuffix(".py") not in COMMAND_LINE
]


def imported_by(path: Path) -> set[str]:
    """Every name that a file imports, also inside functions and for type checkers."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_library_imports_the_command_line():
    assert len(LIBRARIES) > 80
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in LIBRARIES
        for name in imported_by(path)
        if name.startswith(tuple(f"qwhisper.{part}" for part in COMMAND_LINE))
    }
    assert found == set()


def test_data_imports_no_layer_above_it():
    above = tuple(f"qwhisper.{layer}." for layer in ("model", "engine", "infer", "evaluate", "demo", "train"))
    for path in (ROOT / "qwhisper/data").glob("*.py"):
        assert [name for name in imported_by(path) if name.startswith(above)] == [], path.name


@pytest.fixture(scope="module")
def loaded_by_help() -> dict[str, set[str]]:
    """The modules that are loaded once the help of a verb was printed, by verb; "" is the overview. Python's own and
    those that it had loaded before qwhisper are left out.
    """
    code = """
import sys
before = set(sys.modules)
import contextlib, io, json
from qwhisper.cli import main
from qwhisper.commands import VERBS
loaded = {}
for name in ("", *VERBS):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*name.split(), "--help"]) == 0
    loaded[name] = sorted(set(sys.modules) - before)
print(json.dumps(loaded))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    own = sys.stdlib_module_names
    return {
        name: {module for module in modules if module.partition(".")[0] not in own}
        for name, modules in json.loads(done.stdout).items()
    }


@pytest.mark.parametrize("name", ["", *VERBS])
def test_help_loads_nothing_but_flags(loaded_by_help, name):
    """In the order of VERBS each may have what those before it have loaded."""
    loaded = loaded_by_help[name]
    assert {module.partition(".")[0] for module in loaded} == {"qwhisper"}
    libraries = ("data", "model", "engine", "infer", "evaluate", "demo", "guards")
    assert [module for module in loaded if module.startswith(tuple(f"qwhisper.{part}." for part in libraries))] == []
    assert {module for module in loaded if module.startswith("qwhisper.train.")} <= {
        "qwhisper.train.arguments",
        "qwhisper.train.flag_sections",
        "qwhisper.train.hf_names",
        "qwhisper.train.run_flags",
    }
