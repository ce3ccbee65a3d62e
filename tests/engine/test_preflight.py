import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwhisper.engine.preflight import (
    LENGTHS,
    Attention,
    Layout,
    first_fault,
    make_inputs,
    reference,
    trials,
)

CPU = torch.device("cpu")
QWEN3 = Attention(
    owner="language model", groups=2, head_dim=128, scale=128**-0.5, causal=True, window=None,
    dtype=torch.bfloat16, device=CPU, trained=True,
)  # fmt: skip
ENCODER = replace(QWEN3, owner="encoder", groups=1, head_dim=64, scale=1.0, causal=False)
WINDOWED = replace(QWEN3, head_dim=64, scale=0.1, window=40)
ATTENTIONS = {"qwen3": QWEN3, "encoder": ENCODER, "windowed": WINDOWED}
LONGEST = 150
PADDED = Layout((17, 9), False)


def scores(query, key, layout, attention):
    """[rows, heads, tokens, tokens], -inf where a query may not look, by comparing the sequences' numbers."""
    rows, tokens = layout.real(CPU).shape
    number = torch.full((rows, tokens), -1)
    for i, (row, columns) in enumerate(layout.spans()):
        number[row, columns] = i
    position = torch.arange(tokens)
    distance = position[:, None] - position
    allowed = number[:, :, None] == number[:, None, :]
    if attention.causal:
        allowed = allowed & (distance >= 0) & (distance < (attention.window or tokens))
    return (query @ key.transpose(-1, -2) * attention.scale).masked_fill(~allowed[:, None], -math.inf)


def eager(query, key, value, layout, attention):
    """Softmax over whole rows, in the dtype of its inputs."""
    key, value = (x.repeat_interleave(attention.groups, dim=1) for x in (key, value))
    return (scores(query, key, layout, attention).softmax(-1) @ value).transpose(1, 2)


def sdpa(query, key, value, layout, attention):
    """torch's own kernels, one call for each sequence of a packed row, or one with a mask."""
    key, value = (x.repeat_interleave(attention.groups, dim=1) for x in (key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    if not layout.packed:
        mask = layout.mask(attention)
        plain = attention.causal and mask is None
        out = attend(query, key, value, attn_mask=mask, scale=attention.scale, is_causal=plain)
        return out.transpose(1, 2)
    parts = []
    for _, at in layout.spans():
        mask = attention.allowed(at.stop - at.start)
        parts.append(attend(query[:, :, at], key[:, :, at], value[:, :, at], attn_mask=mask, scale=attention.scale))
    return torch.cat(parts, dim=2).transpose(1, 2)


def fault_of(kernel, attention, *, packed=True):
    return first_fault(kernel, trials(attention, LONGEST, packed=packed))


@pytest.mark.parametrize("layout", [Layout((13, 1, 30), True), PADDED], ids=str)
@pytest.mark.parametrize("attention", [replace(a, window=a.window and 5) for a in ATTENTIONS.values()])
def test_the_written_out_gradients_are_those_of_autograd(attention, layout):
    attention = replace(attention, dtype=torch.float32)
    *inputs, grad = (x.double() for x in make_inputs(attention, layout))
    inputs = [x.requires_grad_() for x in inputs]
    out = eager(*(x.transpose(1, 2) for x in inputs), layout, attention)
    real = layout.real(CPU)
    out = out.masked_fill(~real[..., None, None], 0.0)
    expected = [out, *torch.autograd.grad(out, inputs, grad)]
    found = reference(*(x.detach().float() for x in (*inputs, grad)), attention, layout)
    for right, (value, rounding) in zip(expected, found, strict=True):
        right = torch.where(right.isnan(), 0.0, right)  # softmax of padding, which sees nothing
        assert ((value - right).abs() <= rounding + 1e-30).all()


def test_half_of_the_heads_have_rows_of_log_sum_exp_under_minus_100():
    layout = Layout(LENGTHS, True)
    for attention in ATTENTIONS.values():
        query, key, *_ = (x.transpose(1, 2).float() for x in make_inputs(attention, layout))
        lse = scores(query, key.repeat_interleave(attention.groups, dim=1), layout, attention).logsumexp(-1)
        ordinary, low = lse[:, : attention.groups], lse[:, attention.groups :]
        assert ordinary.min() > -20 and low.max() < -100


def test_the_cases_have_the_lengths_that_kernels_are_known_to_fail_at_and_the_runs_own():
    packed, padded = (trials(WINDOWED, LONGEST, packed=packed) for packed in (True, False))
    lengths = {n for _, layout in packed for n in layout.lengths}
    assert {64, 192, 128, 65, 1, LONGEST} <= lengths
    assert {64, 65, 128, 192, LONGEST} <= {layout.tokens for _, layout in padded}
    assert {layout.padding_side for _, layout in padded} == {"left", "right"}
    assert max(attention.window for attention, _ in packed) == WINDOWED.window
    masks = [layout.mask(QWEN3) for _, layout in padded]
    assert any(mask is None for mask in masks) and sum(mask is not None for mask in masks) > 4
    wide = replace(WINDOWED, window=10_000)
    assert {attention.window for attention, _ in trials(wide, LONGEST, packed=True)} == {100, 10_000}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen3", torch.float32),
        ("qwen3", torch.bfloat16),
        pytest.param("qwen3", torch.float16, marks=pytest.mark.slow),
        ("windowed", torch.float16),
        pytest.param("windowed", torch.float32, marks=pytest.mark.slow),
        pytest.param("windowed", torch.bfloat16, marks=pytest.mark.slow),
        *(("encoder", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    ],
)
def test_right_kernels_pass(name, dtype):
    attention = replace(ATTENTIONS[name], dtype=dtype)
    with sdpa_kernel(SDPBackend.MATH):
        assert fault_of(sdpa, attention) is None
    assert fault_of(sdpa, attention) is None
    if attention.causal:
        assert fault_of(sdpa, attention, packed=False) is None


def spoil(kernel, at: int, change):
    """The kernel, with `change` made to the gradient of its input number `at`."""

    def spoiled(*args):
        inputs = [x.view_as(x) for x in args[:3]]
        if inputs[at].requires_grad:
            inputs[at].register_hook(change)
        return kernel(*inputs, *args[3:])

    return spoiled


# The least that must be found in bf16: gradients of queries and keys pass through one rounding more.
@pytest.mark.parametrize(
    ("at", "factor", "tensor"), [(0, 1.25, "queries"), (1, 1.25, "keys"), (2, 1.1, "values"), (0, 8.0, "queries")]
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_gradient_that_is_wrong_by_a_factor_is_named(at, factor, tensor, packed):
    fault = fault_of(spoil(sdpa, at, lambda grad: grad * factor), QWEN3, packed=packed)
    assert fault.what.startswith(f"the gradient of {tensor} is ") and "where rounding explains" in fault.what
    assert "language model (bfloat16, heads of 128 in groups of 2)" in fault.case
    assert ("packed row" if packed else "batch padded on the right") in fault.case


@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_gradient_that_is_not_finite_is_wrong(at):
    def one_nan(grad):
        grad = grad.clone()
        grad[0, 1, 3, 0] = torch.nan
        return grad

    fault = fault_of(spoil(sdpa, at, one_nan), ENCODER)
    assert "is not finite in 1 of " in fault.what and "log-sum-exp under -100" in fault.case


def test_nan_at_padding_is_wrong_too():
    def kernel(*args):
        out = sdpa(*args).clone()
        out[~args[3].real(CPU)] = torch.nan
        return out

    assert fault_of(kernel, QWEN3) is None
    assert "not finite" in fault_of(kernel, QWEN3, packed=False).what


@pytest.mark.parametrize(
    ("kernel", "attention"),
    [
        (lambda q, k, v, layout, a: sdpa(q, k, v, layout, replace(a, scale=1.05 * a.scale)), QWEN3),
        (lambda q, k, v, layout, a: sdpa(q, k, v, layout, replace(a, window=None)), WINDOWED),
        (lambda q, k, v, layout, a: sdpa(q, k, v, layout, replace(a, window=a.window + 1)), WINDOWED),
        (lambda q, k, v, layout, a: sdpa(q, k, v, layout, replace(a, causal=True)), ENCODER),
        (lambda q, k, v, layout, a: sdpa(q, k.flip(1), v.flip(1), layout, a), QWEN3),
    ],
    ids=["scale", "no window", "window too wide by one", "causal", "key heads swapped"],
)
def test_a_wrong_result_is_found(kernel, attention):
    fault = fault_of(kernel, replace(attention, dtype=torch.float16))
    assert fault.what.startswith("the result is ")


def test_a_leak_of_one_token_across_a_border_is_found():
    def leaks(query, key, value, layout, attention):
        first, second, *rest = layout.lengths
        moved = Layout((first - 1, second + 1, *rest), True)
        out = sdpa(query, key, value, moved, attention)
        return torch.cat([sdpa(query, key, value, layout, attention)[:, :first], out[:, first:]], dim=1)

    assert "packed row, 64 + 192" in fault_of(leaks, QWEN3).case


def test_a_kernel_that_does_not_run_here_is_a_fault_with_its_own_words():
    def kernel(*args):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nsomewhere")

    assert fault_of(kernel, QWEN3).what == "it does not run here (FlashAttention only supports Ampere GPUs or newer.)"


def test_memory_that_runs_out_is_no_fault_of_the_kernel():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        fault_of(lambda *args: torch.empty(1 << 60), QWEN3)


def test_what_is_not_trained_is_tried_as_it_runs_without_gradients():
    def kernel(*args):
        assert not torch.is_grad_enabled() and not args[0].requires_grad
        return sdpa(*args)

    with torch.enable_grad():
        assert fault_of(kernel, replace(ENCODER, trained=False)) is None


def test_neither_generators_nor_grad_mode_show_that_a_kernel_was_tried():
    leaves = []

    def kernel(*args):
        leaves.extend(x._base for x in args[:3])
        return sdpa(*args)

    state = torch.get_rng_state()
    with torch.no_grad():
        assert fault_of(kernel, QWEN3) is None
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert leaves and all(leaf.is_leaf and leaf.grad is None for leaf in leaves)
