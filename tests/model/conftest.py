import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch

from qwhisper.model.qwen3_audio import build_from_bases


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def bases(bases) -> tuple[str, str]:
    """(audio, text): folders of a small Whisper encoder and a small Qwen3 with tied embeddings."""
    return str(bases[0]), str(bases[1])


@pytest.fixture(scope="session")
def joined_once(bases) -> Callable:
    """Returns (model, processor) from the small bases, built once for each device."""

    @cache
    def build(on_a_gpu: bool):
        torch.manual_seed(0)
        return build_from_bases(*bases, audio_lead_silence=0.05, audio_tail_silence=0.1)

    return lambda: build(torch.cuda.is_available())


@pytest.fixture
def joined(joined_once):
    """(model, processor) from the small bases: a copy for every test, which takes a tenth of the time of another."""
    return copy.deepcopy(joined_once())


@pytest.fixture
def model(on_the_cpu, joined):
    return joined[0]
