"""The product with a dequantised weight: bitsandbytes' numbers, nothing kept, and one operation to a compiler."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

bitsandbytes = pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit  # noqa: E402

from qwhisper.model import four_bit  # noqa: E402
from qwhisper.model.four_bit import (  # noqa: E402
    Linear4bit,
    adopt_4bit_linears,
    dequantise,
    dequantised_4bit,
    product_4bit,
)

IN, OUT, TOKENS = 128, 192, 50


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_linear(
    dtype=torch.float32, *, nested: bool = True, bias: bool = False, quant_type: str = "nf4"
) -> bitsandbytes.nn.Linear4bit:
    return bitsandbytes.nn.Linear4bit(IN, OUT, bias, dtype, nested, quant_type).to(dtype).to("cpu")


def adopted(linear: bitsandbytes.nn.Linear4bit) -> Linear4bit:
    adopt_4bit_linears(linear)
    return linear


def inputs(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """x, and a gradient of the output."""
    return torch.randn(2, TOKENS, IN, dtype=dtype, requires_grad=True), torch.randn(2, TOKENS, OUT, dtype=dtype)


def output_and_gradient(function, x, gradient) -> tuple[torch.Tensor, torch.Tensor]:
    x.grad = None
    y = function(x)
    y.backward(gradient)
    return y.detach(), x.grad


def weight_of(linear: bitsandbytes.nn.Linear4bit) -> torch.Tensor:
    return dequantize_4bit(linear.weight.data, linear.weight.quant_state)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_input_gradient_are_those_of_bitsandbytes_and_of_the_dequantised_weight(dtype, nested, quant_type):
    linear = make_linear(dtype, nested=nested, quant_type=quant_type)
    x, gradient = inputs(dtype)
    theirs = output_and_gradient(linear, x, gradient)
    ours = output_and_gradient(adopted(linear), x, gradient)
    weight = weight_of(linear)
    assert weight.dtype == dtype
    exact = nn.functional.linear(x.detach(), weight), gradient @ weight
    for mine, other, plain in zip(ours, theirs, exact, strict=True):
        assert torch.equal(mine, plain)
        torch.testing.assert_close(mine, other)


def test_bias_is_added():
    linear = adopted(make_linear(bias=True))
    x, _ = inputs()
    expected = nn.functional.linear(x, weight_of(linear), linear.bias)
    assert linear.bias.abs().sum() > 0
    torch.testing.assert_close(linear(x), expected)


def test_another_dtype_is_computed_in_the_layers():
    linear = adopted(make_linear(torch.bfloat16))
    x, _ = inputs()
    expected = nn.functional.linear(x.bfloat16(), weight_of(linear)).float()
    assert torch.equal(linear(x), expected)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_dequantised_weight_is_kept_for_the_backward_pass(compiled):
    layers = nn.Sequential(adopted(make_linear()), nn.GELU(), nn.Linear(OUT, IN), adopted(make_linear()))
    layers[2].requires_grad_(False)
    run = torch.compile(layers, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else layers
    kept = []
    x, gradient = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = run(x)
    large = {tensor.data_ptr() for tensor in kept if tensor.is_floating_point() and tensor.numel() >= OUT * IN}
    assert large == {layers[2].weight.data_ptr()}
    y.backward(gradient)
    assert x.grad.abs().sum() > 0


def test_compiled_is_the_same_to_the_last_bit():
    linear = adopted(make_linear())
    x, gradient = inputs()
    plain = output_and_gradient(linear, x, gradient)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, output_and_gradient(compiled, x, gradient), strict=True))


@pytest.mark.parametrize(("recomputed", "times"), [(False, 3), (True, 2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_is_computed_again_dequantises_twice_and_keeps_no_weight(monkeypatch, recomputed, times, compiled):
    linear = adopted(make_linear()).train()
    x, gradient = inputs()
    plain = output_and_gradient(linear, x, gradient)
    linear.recomputed = recomputed
    weights: list[weakref.ref] = []

    def counted(*args):
        weight = dequantise(*args)
        weights.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(four_bit, "dequantise", counted)
    run = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else linear
    x.grad = None
    y = checkpoint(run, x, use_reentrant=False)
    assert [weight() for weight in weights] == [None]
    y.backward(gradient)
    assert len(weights) == times
    assert torch.equal(y, plain[0])
    assert torch.equal(x.grad, plain[1])


@pytest.mark.slow
@pytest.mark.parametrize("nested", [True, False])
def test_the_operation_keeps_torchs_rules(nested):
    state = make_linear(nested=nested).weight
    inner = state.quant_state.state2
    scales = [inner.code, inner.absmax, state.quant_state.offset] if nested else []
    for transposed, width in ((False, IN), (True, OUT)):
        x = torch.randn(TOKENS, width, requires_grad=True)
        arguments = (x, state.data, state.quant_state.absmax, scales, (OUT, IN), 64, 256, "nf4", transposed)
        torch.library.opcheck(product_4bit, arguments)
    torch.library.opcheck(dequantised_4bit, (*arguments[1:-1], torch.bfloat16))


def test_only_the_next_tokens_of_answers_use_the_fused_kernel(monkeypatch):
    linear = adopted(make_linear())
    calls = []
    monkeypatch.setattr(four_bit, "product_4bit", lambda *args: calls.append(args[0].shape[0]) or product_4bit(*args))
    few, many = torch.randn(four_bit.FEW_ROWS, IN), torch.randn(four_bit.FEW_ROWS + 1, IN)
    with torch.no_grad():
        torch.testing.assert_close(linear(few), few @ weight_of(linear).T)
        linear(many)
    assert calls == [len(many)]
    linear(few)
    assert calls == [len(many), len(few)]


def test_a_linear_that_accelerate_has_hooked_keeps_its_hook(monkeypatch):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubles(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    linear = add_hook_to_module(make_linear(), Doubles())
    x, _ = inputs()
    expected = linear(x)
    calls = []
    monkeypatch.setattr(four_bit, "product_4bit", lambda *args: calls.append(1) or product_4bit(*args))
    assert torch.equal(adopted(linear)(x), expected)
    assert calls == [1]
