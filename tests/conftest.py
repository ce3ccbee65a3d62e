"""What tests of every room may ask for."""

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# On some CPUs bitsandbytes tells, as it is imported, of a faster kernel that could be installed. A test process lets go
# of it at its end only, after the summary that continuous integration looks for in the last line.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# cuDNN's fp32 convolutions keep 10 bits of the mantissa on a GPU unless told otherwise (matrix products keep all 23);
# our tolerances are those of fp32.
torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that train in forks come first: a fork can take no backward pass once its parent has taken one on a GPU."""
    items.sort(key=lambda item: "on_cpu" not in item.fixturenames)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights, tokenizer and recordings beside the repository; without it a test is skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs real weights and recordings in {folder}")
    return folder
