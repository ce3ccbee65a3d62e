"""torch.export, torch.compile and gradient checkpointing over a joined model."""

import copy

import pytest
import torch

from qwhisper.train.models import checkpoint_activations
from tests.model.parts import gradients
from tests.model.test_generation import rows
from tests.small import small_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small_model().eval()


class Logits(torch.nn.Module):
    """The part of a model that reads embeddings."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds, attention_mask):
        return self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False).logits


@torch.no_grad()
@pytest.mark.slow
def test_the_language_model_part_can_be_exported(model):
    batch = rows(model)
    audio = {name: batch[name] for name in ("audio_waveforms", "audio_lengths")}
    inputs = (model.model.embed(batch["input_ids"], **audio), batch["attention_mask"])
    any_length = {1: torch.export.Dim.AUTO}  # torch 2.11 can't prove a guard of a named one
    shapes = {"inputs_embeds": any_length, "attention_mask": any_length}
    program = torch.export.export(Logits(model), inputs, dynamic_shapes=shapes, strict=False).module()
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(program(*inputs)[seen], Logits(model)(*inputs)[seen], atol=1e-5, rtol=1e-5)
    longer = tuple(torch.cat([tensor, tensor[:, -5:]], dim=1) for tensor in inputs)
    seen = longer[1].bool()
    torch.testing.assert_close(program(*longer)[seen], Logits(model)(*longer)[seen], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_a_compiled_forward_gives_the_same_logits(model):
    batch = rows(model)
    expected = model(**batch).logits
    model.forward = torch.compile(model.forward, backend="aot_eager")
    seen = batch["attention_mask"].bool()
    for _ in range(2):
        torch.testing.assert_close(model(**batch).logits[seen], expected[seen], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_compiled_forward_refuses_placeholders_without_audio(model):
    batch = rows(model)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="more or fewer placeholders than audio tokens"):
        compiled(**text, use_cache=False)
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == model.config.audio_token_id, 1)
    assert torch.isfinite(compiled(**text, use_cache=False).logits).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, use_reentrant):
    """Of layers that are computed again in the backward pass, with the attention that a user has set."""
    batch = rows(model)
    for implementation in ("sdpa", "eager"):
        plain = copy.deepcopy(model).requires_grad_(True).train()
        plain.set_attn_implementation(implementation)
        checkpointed = copy.deepcopy(plain)
        checkpoint_activations(checkpointed, use_reentrant=use_reentrant)
        calls: list[int] = []

        def count(*_, calls=calls) -> None:
            calls.append(1)

        for found in (plain, checkpointed):
            found.model.language_model.layers[0].input_layernorm.register_forward_hook(count)
            found(**batch, labels=batch["input_ids"]).loss.backward()
        assert len(calls) == 3
        expected = gradients(plain)
        assert gradients(checkpointed).keys() == expected.keys()
        for name, gradient in gradients(checkpointed).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)
