"""What `import qwhisper` gives: public names that are imported when they are used."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import qwhisper

ROOT = Path(__file__).parents[1]


def test_importing_the_package_imports_no_library():
    code = """
import sys
before = set(sys.modules)
import qwhisper, json
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout) == ["qwhisper"]


def test_type_checkers_dir_and_imports_know_the_same_names():
    tree = ast.parse(Path(qwhisper.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    checked = {alias.name: node.module for node in imports for alias in node.names}
    assert checked == {name: f"qwhisper.{module}" for name, module in qwhisper._MODULES.items()}
    assert sorted(checked) == sorted(qwhisper.__all__)
    assert set(checked) <= set(dir(qwhisper))


@pytest.mark.parametrize("name", qwhisper.__all__)
def test_every_public_name_is_what_its_module_defines(name):
    found = getattr(qwhisper, name)
    assert (found.__module__, found.__name__) == (f"qwhisper.{qwhisper._MODULES[name]}", name)
    assert found is getattr(qwhisper, name)


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="module 'qwhisper' has no attribute 'Qwen3Audio'"):
        _ = qwhisper.Qwen3Audio
