import dataclasses
from dataclasses import replace

import pytest
import torch

from qwhisper.data.packing import pack_samples, pad_samples
from qwhisper.engine.kernels import attentions, check_kernels, kernels_in_use
from qwhisper.engine.preflight import Attention, first_fault, trials
from qwhisper.errors import NumericalError
from qwhisper.model import attention as ladders
from qwhisper.report.kinds import KernelReplaced
from tests.model.parts import make_sample
from tests.small import SLIDING_WINDOW, small_model
from tests.wrong_kernels import (
    packed_that_leaks,
    packed_with_large_gradient,
    packed_with_nan_gradient,
    padded_with_nan_gradient,
)

LONGEST = 150
QWEN3 = Attention(
    owner="language model", groups=2, head_dim=128, scale=128**-0.5, causal=True, window=None,
    dtype=torch.bfloat16, device=torch.device("cpu"), trained=True,
)  # fmt: skip


def implementations(model) -> tuple[str, str]:
    """That the layers of the encoder and of the language model use."""
    body = model.model
    return ladders.encoder_attention(body.audio_tower.config), ladders.text_attention(body.language_model.config)


def plant(monkeypatch, name: str, wrong) -> list:
    """Puts `wrong(right kernel)` in a kernel's place; returns a list that grows with its calls."""
    ladder = ladders.PACKED_KERNELS if name in ladders.PACKED_KERNELS else ladders.PADDED_KERNELS
    calls = []

    def kernel(*args, **keywords):
        calls.append(name)
        return planted(*args, **keywords)

    # segments and varlen run on CUDA alone; their twin stands in for them.
    planted = wrong(ladder["sdpa_per_segment" if name in ("segments", "varlen") else name])
    monkeypatch.setitem(ladder, name, kernel)
    return calls


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_kernels_give_no_finding_and_leave_no_trace(family, dtype):
    model = small_model(family).to(dtype).train()
    state = torch.get_rng_state()
    assert check_kernels(model, LONGEST) == []
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    assert implementations(model) == (ladders.PACKED_ATTENTION, ladders.PACKED_ATTENTION)


@pytest.mark.parametrize(
    "attention",
    [
        QWEN3,
        replace(QWEN3, groups=4, head_dim=64, scale=0.125, dtype=torch.float16),
        replace(QWEN3, window=48),
        replace(QWEN3, owner="encoder", groups=1, head_dim=64, scale=1.0, causal=False, dtype=torch.float32),
    ],
    ids=["heads of 128", "heads of 64", "window", "encoder"],
)
def test_every_kernel_of_the_ladders_is_right_on_this_machine(attention):
    tried = []
    for implementation in ("qwhisper_packed_sdpa", "qwhisper_packed_math_padded_math"):
        for name, kernel, packed in kernels_in_use(attention, implementation):
            assert first_fault(kernel, trials(attention, LONGEST, packed=packed)) is None
            tried.append(name)
    padded = ["sdpa", "math"] if attention.causal else []
    assert sorted(tried) == sorted(["sdpa_per_segment", "math_per_segment", *padded])


@pytest.mark.parametrize(
    ("name", "wrong", "replaced_by", "words"),
    [
        ("sdpa_per_segment", packed_with_nan_gradient, "math_per_segment", "gradient of queries is not finite in"),
        ("sdpa_per_segment", packed_with_large_gradient, "math_per_segment", "gradient of queries is "),
        ("sdpa_per_segment", packed_that_leaks, "math_per_segment", "the result is "),
        ("segments", packed_with_nan_gradient, "varlen", "gradient of queries is not finite in"),
        ("segments", packed_with_large_gradient, "varlen", "gradient of queries is "),
        ("segments", packed_that_leaks, "varlen", "the result is "),
        ("varlen", packed_with_nan_gradient, "sdpa_per_segment", "gradient of queries is not finite in"),
        ("varlen", packed_with_large_gradient, "sdpa_per_segment", "gradient of queries is "),
        ("sdpa", padded_with_nan_gradient, "math", "gradient of queries is not finite in"),
    ],
)
def test_a_wrong_kernel_is_named_and_replaced(name, wrong, replaced_by, words, monkeypatch):
    model = small_model()
    calls = plant(monkeypatch, name, wrong)
    for kernel in ("segments", "varlen"):
        monkeypatch.setattr(ladders, f"{kernel}_can_run", lambda query, dropout, kernel=kernel: name == kernel)
    (found,) = check_kernels(model, LONGEST)
    assert (found.kernel, found.replaced_by) == (name, replaced_by) and words in found.what
    if wrong in (packed_with_nan_gradient, padded_with_nan_gradient):
        assert "language model" in found.case and "log-sum-exp under -100" in found.case
    line = KernelReplaced(**dataclasses.asdict(found)).line(0)
    assert line.startswith(f"attention kernel {name}: ") and line.endswith(f"Replaced by {replaced_by}")

    calls.clear()
    samples = [make_sample(model, [30]), make_sample(model, [9, 4], [2000], seed=1)]
    for batch in (pack_samples(samples), pad_samples(samples, pad_token_id=0)):
        assert model(**batch).loss.isfinite()
    assert calls == []


def test_a_kernel_that_is_wrong_in_the_encoder_alone_is_found(monkeypatch):
    def not_causal_is_wrong(right):
        return lambda *args, causal, **rest: right(*args, causal=True, **rest)

    plant(monkeypatch, "sdpa_per_segment", not_causal_is_wrong)
    (found,) = check_kernels(small_model(), LONGEST)
    assert found.case.startswith("encoder (float32, heads of 8 in groups of 1)")


def test_a_gradient_that_the_run_never_takes_is_not_held_against_a_kernel(monkeypatch):
    def wrong_where_not_causal(right):
        wrong = packed_with_large_gradient(right)
        return lambda *args, causal, **rest: (right if causal else wrong)(*args, causal=causal, **rest)

    plant(monkeypatch, "sdpa_per_segment", wrong_where_not_causal)
    model = small_model()
    assert check_kernels(model, LONGEST) == []
    model.model.audio_tower.requires_grad_(True)
    assert [found.kernel for found in check_kernels(model, LONGEST)] == ["sdpa_per_segment"]


def test_with_no_right_kernel_left_the_run_does_not_begin(monkeypatch):
    for name in ("sdpa_per_segment", "math_per_segment"):
        plant(monkeypatch, name, packed_with_large_gradient)
    with pytest.raises(NumericalError, match=r"the last, math_per_segment: the gradient of queries is .* another card"):
        check_kernels(small_model(), LONGEST)


def test_a_verdict_belongs_to_the_model_that_it_was_made_for(monkeypatch):
    checked, other = small_model(), small_model()
    calls = plant(monkeypatch, "sdpa", padded_with_nan_gradient)
    check_kernels(checked, LONGEST)
    assert implementations(checked) == ("qwhisper_packed", "qwhisper_packed_padded_math")
    assert implementations(other) == implementations(small_model()) == ("qwhisper_packed", "qwhisper_packed")
    batch = pad_samples([make_sample(checked, [30]), make_sample(checked, [9], seed=1)], pad_token_id=0)
    called = []
    for model in (checked, other, checked):
        calls.clear()
        assert model(**batch).loss.isfinite()
        called.append(len(calls))
    assert called == [0, len(other.model.language_model.layers), 0]


def test_a_kernel_is_replaced_in_the_parts_that_use_it_alone(monkeypatch):
    def not_causal_is_wrong(right):
        return lambda *args, causal, **rest: right(*args, causal=True, **rest)

    model = small_model()
    plant(monkeypatch, "sdpa_per_segment", not_causal_is_wrong)
    model.set_attn_implementation({"text_config": "qwhisper_packed_math"})
    check_kernels(model, LONGEST)
    assert implementations(model) == ("qwhisper_packed_math", "qwhisper_packed_math")
    model = small_model()
    model.set_attn_implementation({"text_config": "eager"})
    check_kernels(model, LONGEST)
    assert implementations(model) == ("qwhisper_packed_math", "eager")


def test_kernels_are_tried_as_the_forward_pass_will_use_them():
    """Also where an implementation was set past the model's own method."""
    model = small_model()
    model.model.language_model.set_attn_implementation("sdpa")
    model.config.audio_config._attn_implementation = "eager"
    assert check_kernels(model, LONGEST) == []
    assert implementations(model) == ("eager", "qwhisper_packed")
    assert {attention.owner for attention in attentions(model)} == {"language model"}


def test_what_is_tried_are_the_models_own_attentions():
    model = small_model("gemma3").to(torch.bfloat16)
    model.model.audio_tower.float().requires_grad_(True)
    encoder, sliding, full = attentions(model)
    assert (encoder.owner, encoder.dtype, encoder.causal, encoder.trained) == ("encoder", torch.float32, False, True)
    assert (sliding.window, full.window) == (SLIDING_WINDOW, None)
    assert (full.groups, full.head_dim, full.dtype, full.causal) == (2, 8, torch.bfloat16, True)
    assert full.scale == pytest.approx(8**-0.5)
    model.model.language_model.set_attn_implementation("eager")
    assert [attention.owner for attention in attentions(model)] == ["encoder"]
