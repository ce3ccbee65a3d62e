import copy

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
def joined_once(bases):
    torch.manual_seed(0)
    return build_from_bases(*bases, audio_lead_silence=0.05, audio_tail_silence=0.1)


@pytest.fixture
def joined(joined_once):
    """(model, processor) from the small bases: a copy for every test, which takes a tenth of the time of another."""
    return copy.deepcopy(joined_once)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """What is loaded again is compared to the bit, so all of it is computed there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def model(on_the_cpu, joined):
    return joined[0]
