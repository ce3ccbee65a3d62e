"""What tests of every room may ask for."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights, tokenizer and recordings beside the repository; without it a test is skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{folder} is not there, but CI is set: these tests must not be skipped")
        pytest.skip(f"needs real weights and recordings in {folder}")
    return folder
