"""What tests of every room may ask for."""

from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights, tokenizer and recordings beside the repository; without it a test is skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs real weights and recordings in {folder}")
    return folder
