"""The mixins that `tests.huggingface.mixins` has fetched, as this package's tests take them."""

import importlib
import sys

import pytest

from tests.huggingface.mixins import PACKAGE, folder


def mixin(module: str, name: str) -> type:
    """A class of a module of transformers' tests; skips the module that asks if they have not been fetched."""
    if not (folder() / PACKAGE).exists():
        pytest.skip(
            "the mixins of the installed transformers are missing: run `python -m tests.huggingface.mixins`",
            allow_module_level=True,
        )
    if str(folder()) not in sys.path:
        sys.path.append(str(folder()))
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)
