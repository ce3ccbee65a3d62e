"""Prompts of many lengths, and a model that writes letters alone."""

from collections.abc import Callable, Iterator

import pytest
import soundfile
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwhisper.data.dialogue import AudioClip, Message
from qwhisper.data.rows import Sample
from qwhisper.infer.decoding import Chooser, Reader
from tests.small import tone


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> list[AudioClip]:
    folder = tmp_path_factory.mktemp("tones")
    clips = []
    for n, (frequency, seconds) in enumerate([(200, 0.3), (800, 1.1), (2000, 0.05), (900, 0.3)]):
        soundfile.write(folder / f"{n}.wav", tone(frequency, seconds), 16_000)
        clips.append(AudioClip(str(folder / f"{n}.wav")))
    return clips


@pytest.fixture(scope="session")
def conversations(tones) -> list[list[Message]]:
    """No clip, one, several, in one turn and in two."""
    return [
        [Message("user", ("Hello",))],
        [Message("user", (tones[0], "Pitch?"))],
        [Message("user", (tones[1],))],
        [Message("user", ("A long question about nothing at all, without any audio. " * 4,))],
        [
            Message("user", (tones[1], tones[0], "Which is higher?")),
            Message("assistant", ("the first",)),
            Message("user", (tones[2],)),
        ],
    ]


@pytest.fixture(scope="session")
def prompts(small_model, conversations) -> list[Sample]:
    return [small_model[1].encode_prompt(messages) for messages in conversations]


@pytest.fixture
def letters(small_model) -> Iterator[None]:
    """The small model writes small letters alone: what it writes is tokenised as it was written, and never ends."""
    model, encoder = small_model
    ids = encoder.tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]

    def leave_letters(module, inputs, logits):
        others = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        others[ids] = False
        return logits.masked_fill(others, -torch.inf)

    hook = model.lm_head.register_forward_hook(leave_letters)
    yield
    hook.remove()


@pytest.fixture
def write_out(small_model, monkeypatch) -> Callable[[str], None]:
    """Makes the model write a text, whatever it was asked."""
    tokenizer = small_model[1].tokenizer

    def write_out(text: str) -> None:
        script = tokenizer(text, add_special_tokens=False)["input_ids"]
        places: dict[Chooser, int] = {}

        def choose(chooser, logits):
            places[chooser] = places.get(chooser, -1) + 1
            return torch.full(logits.shape[:1], script[places[chooser]], device=logits.device)

        monkeypatch.setattr(Chooser, "choose", choose)

    return write_out


class Waits(TorchDispatchMode):
    """While it is entered, `count` grows with every value that the host takes from a tensor, outside of the model."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.reading = 0, False
        tolist, read = torch.Tensor.tolist, Reader.read

        def counted(tensor):
            self.count += 1
            return tolist(tensor)

        def uncounted(reader, embeddings):
            self.reading = True
            logits = read(reader, embeddings)
            self.reading = False
            return logits

        monkeypatch.setattr(torch.Tensor, "tolist", counted)
        monkeypatch.setattr(Reader, "read", uncounted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and not self.reading:  # item, int, float, bool
            self.count += 1
        return func(*args, **kwargs or {})


@pytest.fixture
def waits(monkeypatch) -> Waits:
    return Waits(monkeypatch)


def say(text: str, *clips, role: str = "user") -> dict:
    return {"role": role, "content": [*({"type": "audio", "audio": clip} for clip in clips), text]}
