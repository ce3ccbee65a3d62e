"""No weight is lost on saving: what differs from its base is written with the whole model, or refused by name."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForMultimodalLM, GenerationConfig

from qwhisper.errors import UsageError
from qwhisper.model import Qwen3AudioForConditionalGeneration
from qwhisper.model.bases import LoadOptions
from qwhisper.model.loading import build_from_bases, load_trained
from qwhisper.model.lora import add_lora
from qwhisper.model.weights import differing, plain_weights
from tests.model.parts import gradients, large_weights, small_model
from tests.model.test_loading import logits, trained
from tests.model.test_modeling import audio_batch
from tests.small import write_small_bases

TRAINED, WHOLE = "projector.safetensors", "model.safetensors"


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


@pytest.fixture
def heard(joined):
    """The joined model with weights that let audio and attention change its answers; all of them count as its bases'."""
    model, _ = joined
    large_weights(model.model.language_model)
    large_weights(model.model.audio_tower)
    from qwhisper.model.weights import base_record

    model.base_record = base_record(plain_weights(model.state_dict()))
    return model
