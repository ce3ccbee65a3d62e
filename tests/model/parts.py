"""Samples for small joined models, reading back their gradients and logits, and saving and loading them."""

from dataclasses import replace
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn

from qwhisper import Qwen3AudioForConditionalGeneration
from qwhisper.data.packing import pack_samples
from qwhisper.data.rows import Sample
from qwhisper.data.windows import clip_windows
from qwhisper.model.audio_embedding import device_of
from qwhisper.model.lora import add_lora
from tests.small import VOCABULARY

CLIPS = [800, 7_000, 16_001]
TRAINED, WHOLE = "projector.safetensors", "model.safetensors"
# For tests of a tied head on the disk: accelerate 1.3 fails, 1.15 does not.
TIED_ON_DISK = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"), reason="accelerate drops a tied weight twice"
)


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def make_sample(model, text_lengths: list[int], clip_samples: list[int] = (), *, seed: int = 0) -> Sample:
    """Text of the given lengths with a clip between each two of them; the last text is supervised."""
    generator = np.random.default_rng(seed)
    clips = [clip_windows(noise(n, seed + i), model.config.frames) for i, n in enumerate(clip_samples)]
    ids: list[int] = []
    for i, length in enumerate(text_lengths):
        ids += generator.integers(3, VOCABULARY - 2, size=length).tolist()
        if i < len(clips):
            ids += [model.config.audio_token_id] * model.config.frames.num_tokens(clip_samples[i])
    ids = np.array(ids, dtype=np.int64)
    labels = np.full_like(ids, -100)
    labels[-text_lengths[-1] :] = ids[-text_lengths[-1] :]
    labels[0] = -100
    return Sample(f"s{seed}", "test", ids, labels, [window for clip in clips for window in clip])


def with_teacher(sample: Sample, seed: int) -> Sample:
    """One that reads six words in place of the clips."""
    supervised = sample.labels != -100
    words = np.random.default_rng(seed).integers(3, VOCABULARY - 2, size=6)
    ids = np.concatenate([words, sample.input_ids[supervised]])
    labels = np.concatenate([np.full(6, -100), sample.labels[supervised]])
    return replace(sample, teacher=Sample(sample.id, "test", ids, labels))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def audio_batch(model, clip_samples=CLIPS) -> dict:
    return pack_samples([make_sample(model, [3] * len(clip_samples) + [4], clip_samples)])


def trained(model, **values):
    """LoRA on the model and every trainable weight away from its start."""
    add_lora(model, **values)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model) -> torch.Tensor:
    row = pack_samples([make_sample(model, [5, 4], [3000])])
    del row["labels"]
    device = device_of(model.get_input_embeddings())
    row = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in row.items()}
    with torch.no_grad():
        return model.eval()(**row).logits


def kind(folder: Path) -> str:
    """The one of both files that is there."""
    (found,) = [name for name in (TRAINED, WHOLE) if (folder / name).exists()]
    return found


def reloaded(model, folder: Path, expected: str):
    """The model after saving and loading; its folder must be of the expected kind, its answers the same to the bit."""
    model.save_pretrained(folder)
    assert kind(folder) == expected
    again = Qwen3AudioForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(logits(again), logits(model))
    return again


def step(model) -> None:
    """One optimizer step on all that requires gradients, with a gradient for each of it."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.train()(**audio_batch(model)).loss.backward()
    assert trainable.keys() == gradients(model).keys()
    torch.optim.SGD(trainable.values(), lr=1.0).step()
    model.zero_grad()


def lora(model, **values):
    """PEFT's own way to LoRA, as a user takes it; its B is not zero."""
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **values})
    return get_peft_model(model, config)
