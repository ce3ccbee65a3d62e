"""Attention kernels that are wrong on the machine at hand: the preflight replaces them before the first step."""

import pytest
import torch

from qwhisper.data.packing import pack_samples, pad_samples
from qwhisper.engine import kernels
from qwhisper.model import attention
from qwhisper.model.lora import add_lora
from tests.model.parts import gradients, make_sample
from tests.small import large_weights, small_model
from tests.test_faults.matrix import fault
from tests.wrong_kernels import packed_that_leaks, packed_with_large_gradient, padded_with_nan_gradient

LONGEST = 100
RIGHT = attention.PACKED_KERNELS | attention.PADDED_KERNELS


@pytest.fixture
def model():
    """LoRA on a small LM with a massive activation as Qwen's: every row's log-sum-exp is under -100."""
    torch.manual_seed(0)
    model = small_model()
    add_lora(model)
    large_weights(model.model.language_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 50.0
        for layer in model.model.language_model.layers:
            attend = layer.self_attn
            # The slowest of the rotary frequencies, so that the score does not depend on the distance.
            slowest = torch.tensor([0.0, 0.0, 0.0, 5.0] * 2)
            attend.q_proj.base_layer.weight[:, 0] = slowest.repeat(4)
            attend.k_proj.base_layer.weight[:, 0] = -slowest.repeat(2)
            attend.q_norm.weight.fill_(6.5)
            attend.k_norm.weight.fill_(6.5)
    return model.train()


def without_preflight(monkeypatch):
    monkeypatch.setattr(kernels, "check_kernels", lambda model, longest: [])


def samples(model):
    return [make_sample(model, [64], seed=1), make_sample(model, [20, 12], seed=2)]


def gradients_of(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return gradients(model)


def after_preflight(model, batch, name: str, wrong, monkeypatch):
    """What the preflight says of a run whose kernel `name` is wrong, that run's gradients, and right ones."""
    right = gradients_of(model, batch)
    ladder = attention.PACKED_KERNELS if name in attention.PACKED_KERNELS else attention.PADDED_KERNELS
    monkeypatch.setitem(ladder, name, wrong(RIGHT[name]))
    findings = kernels.check_kernels(model, LONGEST)
    return [(found.kernel, found.replaced_by) for found in findings], gradients_of(model, batch), right


def assert_equal_to_rounding(found, right):
    for name, grad in found.items():
        # fp32 rounds a score of -120 by 1e-5, which is that share of a probability; the keys are all alike, so that a
        # thousandth of the terms is what their sum leaves.
        torch.testing.assert_close(grad, right[name], atol=0.01 * float(right[name].abs().max()), rtol=0)


@fault(
    "attention kernel whose backward pass gives NaN at 64 or 192 tokens and a low log-sum-exp",
    of="numerical",
    guarantee="found before the first step, named and replaced; the gradients are those of the right kernel",
    without=without_preflight,
)
def test_kernel_with_nan_in_its_backward_pass_is_replaced(model, monkeypatch):
    batch = pad_samples(samples(model), pad_token_id=0)
    assert batch["input_ids"].shape[1] == 64
    named, grads, right = after_preflight(model, batch, "sdpa", padded_with_nan_gradient, monkeypatch)
    assert_equal_to_rounding(grads, right)
    assert named == [("sdpa", "math")]


@fault(
    "attention kernel whose gradients are 8 times too large",
    of="numerical",
    guarantee="found before the first step, named and replaced; the gradients are those of the right kernel",
    without=without_preflight,
)
def test_kernel_with_gradients_of_the_wrong_size_is_replaced(model, monkeypatch):
    batch = pack_samples(samples(model))
    named, grads, right = after_preflight(model, batch, "sdpa_per_segment", packed_with_large_gradient, monkeypatch)
    assert_equal_to_rounding(grads, right)
    assert named == [("sdpa_per_segment", "math_per_segment")]


@fault(
    "attention kernel that lets a sample see the one before it in a packed row",
    of="numerical",
    guarantee="found before the first step, named and replaced; no sample depends on its neighbour",
    without=without_preflight,
)
def test_kernel_that_leaks_between_samples_is_replaced(model, monkeypatch):
    first, second = samples(model)
    batch = pack_samples([first, second])
    named, _, _ = after_preflight(model, batch, "sdpa_per_segment", packed_that_leaks, monkeypatch)
    del batch["labels"]
    with torch.no_grad():
        before = model(**batch).logits
        batch["input_ids"][0, len(first.input_ids) - 1] += 1
        after = model(**batch).logits
    assert torch.equal(before[:, len(first.input_ids) :], after[:, len(first.input_ids) :])
    assert named == [("sdpa_per_segment", "math_per_segment")]
