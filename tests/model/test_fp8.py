"""Products of weights in fp8: what they compute, on the CPU, whose `_scaled_mm` has both of a GPU's forms."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from qwhisper.model.fp8 import (
    DEQUANTISED,
    FLOAT8,
    LEAST_SCALE,
    PRODUCTS,
    ROWWISE,
    TENSORWISE,
    Float8Linear,
    dequantise,
    product_for,
    quantise_rows,
)

pytestmark = pytest.mark.usefixtures("rowwise_product")

IN, OUT, TOKENS = 96, 48, 33
IN_FP8 = (ROWWISE, TENSORWISE)
SLOWER = (TENSORWISE, DEQUANTISED)
BF16 = torch.finfo(torch.bfloat16).eps  # two roundings, of half of it each


def make_layer(product: str, dtype=torch.float32, bias: bool = False) -> tuple[Float8Linear, nn.Linear]:
    """A layer in fp8, and the one that it was made from."""
    torch.manual_seed(0)
    full = nn.Linear(IN, OUT, bias, dtype=dtype)
    layer = Float8Linear(IN, OUT, bias, dtype)
    weight, scale = quantise_rows(full.weight.detach())
    layer.weight, layer.weight_scale = (nn.Parameter(x, requires_grad=False) for x in (weight, scale))
    layer.bias = full.bias
    layer.product = product
    return layer, full


def run(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, gradient of x)."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


def rounding(x: torch.Tensor) -> torch.Tensor:
    """The most that fp8 with one scale a row changes: half a unit of 3 bits, or of a subnormal number."""
    scales = x.abs().amax(-1, keepdim=True) / 448
    return torch.maximum(2.0**-4 * x.abs(), 2.0**-10 * scales) * (1 + 1e-6)


def inputs(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and gradients with rows of every size, of zeros, and with one outlier."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in (IN, OUT):
        rows = torch.randn(TOKENS, size, generator=generator) * 10.0 ** torch.linspace(-6, 3, TOKENS)[:, None]
        rows[3] = 0
        rows[4, 5] = 1e4
        found.append(rows.to(dtype))
    return found[0], found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantised_rows_are_within_half_a_unit_and_never_nan(dtype):
    for rows in (*inputs(dtype), torch.full((7, 16), torch.finfo(dtype).max, dtype=dtype)):
        values, scales = quantise_rows(rows)
        assert (values.dtype, scales.dtype, scales.shape) == (FLOAT8, torch.float32, (len(rows), 1))
        assert ((values.double() * scales - rows.double()).abs() <= rounding(rows.double())).all()
        assert (values.float().abs().amax(-1) == 448).logical_or(rows.float().abs().amax(-1) == 0).all()


def test_the_largest_value_of_any_row_stays_below_what_the_cast_makes_nan():
    """Torch before 2.13 casts what is over 464 to NaN. Every bf16 number is a row's largest here."""
    every = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[:, None]
    ratios = every / (every.float() / 448 + LEAST_SCALE)
    assert ratios.max() < 448.001
    values, _ = quantise_rows(every)
    assert (values[every > 1e-30].float() == 448).all() and not values.isnan().any()


def test_gradients_of_1e_12_keep_their_precision():
    rows = inputs()[1] * 1e-12
    values, scales = quantise_rows(rows)
    assert ((values.float() * scales - rows).abs() <= rounding(rows)).all()


@pytest.mark.parametrize("product", PRODUCTS)
def test_result_and_gradient_are_as_near_to_the_full_weights_as_fp8_allows(product):
    layer, full = make_layer(product)
    x, grad = inputs()
    y, dx = run(layer, x, grad)
    w = full.weight.detach().double()
    dw = rounding(w)
    in_fp8 = product in IN_FP8
    x, grad = x.double(), grad.double()
    ex = rounding(x) if in_fp8 else torch.zeros(())
    bound = (x.abs() + ex) @ (w.abs() + dw).T - x.abs() @ w.abs().T
    assert ((y - x @ w.T).abs() <= bound + BF16 * y.abs() + 1e-30).all()
    # dx: the scales of w are multiplied into the gradient before it is quantised
    folded = grad * layer.weight_scale.T.double()
    eg = rounding(folded) if in_fp8 else torch.zeros(())
    plain = w / layer.weight_scale
    bound = (folded.abs() + eg) @ (plain.abs() + dw / layer.weight_scale) - folded.abs() @ plain.abs()
    assert ((dx - grad @ w).abs() <= bound + BF16 * dx.abs() + 1e-30).all()
    # And in the mean far nearer than that: errors of many values cancel.
    assert (y - x @ w.T).norm() < 0.06 * y.norm() and (dx - grad @ w).norm() < 0.06 * dx.norm()


@pytest.mark.parametrize("product", IN_FP8)
def test_result_and_gradient_are_those_of_the_quantised_values(product):
    """All that an fp8 product adds is the rounding of its result to bf16."""
    layer, _ = make_layer(product)
    x, grad = inputs()
    y, dx = run(layer, x, grad)
    w = dequantise(layer.weight, layer.weight_scale, torch.float64)
    qx = dequantise(*quantise_rows(x), torch.float64)
    folded = dequantise(*quantise_rows(grad * layer.weight_scale.T), torch.float64)
    for got, expected in ((y, qx @ w.T), (dx, folded @ layer.weight.double())):
        assert ((got - expected).abs() <= BF16 * expected.abs() + 1e-5 * expected.abs().amax(-1, keepdim=True)).all()
        assert (got[3] == 0).all()


def test_the_dequantised_product_is_the_linear_of_the_dequantised_weight():
    layer, _ = make_layer(DEQUANTISED, bias=True)
    plain = nn.Linear(IN, OUT)
    plain.weight.data = dequantise(layer.weight, layer.weight_scale, torch.float32)
    plain.bias.data = layer.bias.data
    for got, expected in zip(run(layer, *inputs()), run(plain, *inputs()), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_so_and_changes_no_other(product, bad):
    layer, _ = make_layer(product)
    x, grad = inputs()
    expected = run(layer, x, grad)
    x[7], grad[7] = bad, bad
    x[8, 1], grad[8, 1] = bad, bad
    others = [row for row in range(TOKENS) if row not in (7, 8)]
    for got, before in zip(run(layer, x, grad), expected, strict=True):
        assert not torch.isfinite(got[7:9]).any()
        assert torch.equal(got[others], before[others])


@pytest.mark.parametrize("product", PRODUCTS)
def test_nothing_but_the_weight_is_kept_for_the_backward_pass(product):
    layer, _ = make_layer(product, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(inputs(torch.bfloat16)[0].requires_grad_())
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr(), layer.weight_scale.data_ptr()]


@pytest.mark.parametrize("product", [ROWWISE, *(pytest.param(p, marks=pytest.mark.slow) for p in SLOWER)])
def test_it_compiles_whole_with_the_same_numbers_and_keeps_nothing_else(product):
    layer, _ = make_layer(product, torch.bfloat16, bias=True)
    x, grad = inputs(torch.bfloat16)
    expected = run(layer, x, grad)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = run(compiled, x, grad)
    for got, eager in zip(found, expected, strict=True):
        assert torch.equal(got, eager)
    # A weight that the forward pass made for the backward pass would be a second copy of the model.
    assert {t.data_ptr() for t in kept if t.dim()} == {layer.weight.data_ptr(), layer.weight_scale.data_ptr()}


@pytest.mark.parametrize("product", PRODUCTS)
def test_it_never_waits_for_the_device(product):
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        layer, _ = make_layer(DEQUANTISED, torch.bfloat16)
        layer.product = product
        x, grad = (fake.from_tensor(torch.empty(TOKENS, size, dtype=torch.bfloat16)) for size in (IN, OUT))
        y, dx = run(layer, x, grad)
    assert (y.shape, dx.shape) == ((TOKENS, OUT), (TOKENS, IN))


CAPABILITIES = {
    "T4": ((7, 5), DEQUANTISED), "A100": ((8, 0), DEQUANTISED), "RTX 3090": ((8, 6), DEQUANTISED),
    "RTX 4090": ((8, 9), TENSORWISE), "H100": ((9, 0), ROWWISE), "B200": ((10, 0), TENSORWISE),
    "RTX 5090": ((12, 0), TENSORWISE), "no NVIDIA card": (None, DEQUANTISED),
}  # fmt: skip


@pytest.mark.parametrize("card", CAPABILITIES)
def test_the_kernel_is_chosen_by_the_cards_capability(card):
    capability, expected = CAPABILITIES[card]
    assert product_for(capability, 4096, 12288) == expected
    assert product_for(capability, 4096, 100) == product_for(capability, 24, 4096) == DEQUANTISED


def test_a_cast_leaves_weights_and_scales_as_they_are():
    layer, _ = make_layer(ROWWISE, bias=True)
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    model = copy.deepcopy(nn.Sequential(layer, nn.Linear(OUT, 2)))
    for cast in (model.bfloat16, model.half, lambda: model.to("cpu", torch.float32), model.double):
        cast()
        assert model[0].weight.dtype == FLOAT8 and model[0].weight_scale.dtype == torch.float32
        assert torch.equal(model[0].weight.view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(model[0].weight_scale, scale)
        assert model[0].bias.dtype == model[1].weight.dtype
    model.to("meta")
    assert (model[0].weight.dtype, model[0].weight_scale.dtype) == (FLOAT8, torch.float32)


def test_weights_in_another_dtype_are_refused_instead_of_cast_without_a_scale():
    layer, full = make_layer(ROWWISE)
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32, and this layer is in fp8"):
        layer.load_state_dict(full.state_dict(), strict=False)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
