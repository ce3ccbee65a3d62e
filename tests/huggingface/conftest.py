"""Registers the marks of transformers' mixins."""

import re

import pytest

from tests.huggingface.mixins import PACKAGE, folder


def pytest_configure(config: pytest.Config) -> None:
    texts = [file.read_text(encoding="utf-8") for file in (folder() / PACKAGE).rglob("*.py")]
    for name in sorted(
        {name for text in texts for name in re.findall(r"\bmark\.(\w+)", text)}
        - {"parametrize", "skip", "skipif", "xfail"}
    ):
        config.addinivalue_line("markers", f"{name}: a mark of transformers' mixins")
