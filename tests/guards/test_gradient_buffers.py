"""Gradients in flat buffers: the same bits as autograd's own, in memory that stays."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from qwhisper.guards.gradient_buffers import ALIGNMENT, GradientBuffers
from qwhisper.guards.gradients import drop_gradients


def memory_of(buffers: GradientBuffers) -> list[int]:
    return [flat.data_ptr() for flat in buffers.flat]


def is_in(tensor: torch.Tensor, buffers: GradientBuffers) -> bool:
    return tensor.untyped_storage().data_ptr() in memory_of(buffers)


def backward(layer: nn.Module, seed: int, **options) -> None:
    torch.manual_seed(seed)
    dtype = next(layer.parameters()).dtype
    layer(torch.randn(3, 5, dtype=dtype)).square().sum().backward(**options)


def twins() -> list[nn.Linear]:
    """Two equal linears whose matrix is transposed in memory."""
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = nn.Linear(5, 7)
        layer.weight = nn.Parameter(torch.randn(5, 7).t())
        layers.append(layer)
    return layers


def test_a_group_has_one_flat_tensor_for_each_dtype_and_its_gradients_lie_apart_and_aligned():
    layer, low, projector = nn.Linear(5, 7), nn.Linear(5, 7, dtype=torch.bfloat16), nn.Linear(5, 7)
    mixed = [*layer.parameters(), *low.parameters()]
    buffers = GradientBuffers({"lora": mixed, "projector": list(projector.parameters())})
    assert [flat.dtype for flat in buffers.flat] == [torch.float32, torch.bfloat16, torch.float32]
    assert all(flat.ndim == 1 and not flat.any() for flat in buffers.flat)
    buffers.start()
    for module in (layer, low):
        backward(module, 0)
        for parameter in module.parameters():
            offset = parameter.grad.storage_offset() * parameter.element_size()
            assert is_in(parameter.grad, buffers) and offset % ALIGNMENT == 0
        weight, bias = module.weight.grad.clone(), module.bias.grad.clone()
        module.weight.grad.fill_(3.0)
        assert torch.equal(module.bias.grad, bias) and not torch.equal(module.weight.grad, weight)


@pytest.mark.parametrize("passes", [1, 3])
def test_sums_have_the_bits_and_the_layout_of_autograds_own_gradients(passes):
    plain, buffered = twins()
    buffers = GradientBuffers({"all": list(buffered.parameters())})
    for first in (0, 10):  # the second step begins on what the first has left
        buffers.start()
        plain.zero_grad()
        for seed in range(first, first + passes):
            backward(plain, seed)
            backward(buffered, seed)
        for mine, autograds in zip(buffered.parameters(), plain.parameters(), strict=True):
            assert is_in(mine.grad, buffers)
            assert torch.equal(mine.grad, autograds.grad) and mine.grad.stride() == autograds.grad.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_autograd_never_replaces_a_buffer_whatever_dtype_and_layout_arrive(dtype):
    weight = nn.Parameter(torch.randn(6, 4, dtype=dtype))
    buffers = GradientBuffers({"all": [weight]})
    buffers.start()
    torch.nn.functional.embedding(torch.tensor([1, 3]), weight, sparse=True).sum().backward()
    weight.t().expand(2, 4, 6).sum().backward()
    weight.float().sum().backward()
    assert weight.grad.data_ptr() == buffers.flat[0].data_ptr() and weight.grad.dtype == dtype
    assert weight.grad[:, 0].tolist() == [3, 4, 3, 4, 3, 3]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_what_create_graph_replaces_is_right_and_the_next_step_has_its_buffer_again():
    plain, buffered = twins()
    buffers = GradientBuffers({"all": list(buffered.parameters())})
    buffers.start()
    for layer in (plain, buffered):
        backward(layer, 0)
        backward(layer, 1, create_graph=True)
    assert torch.equal(buffered.weight.grad, plain.weight.grad) and not is_in(buffered.weight.grad, buffers)
    plain.zero_grad()
    buffers.start()
    backward(buffered, 2)
    assert is_in(buffered.weight.grad, buffers)


def test_what_no_gradient_reaches_stays_none():
    reached, other = nn.Linear(5, 7), nn.Linear(5, 7)
    buffers = GradientBuffers({"all": [*reached.parameters(), *other.parameters()]})
    buffers.start()
    backward(reached, 0)
    assert all(is_in(p.grad, buffers) for p in reached.parameters())
    assert all(p.grad is None for p in other.parameters())


def test_no_view_is_attached_that_is_not_zero():
    """Before a step, and where a gradient has been dropped in one, autograd makes gradients as without buffers."""
    plain, buffered = twins()
    groups = {"all": list(buffered.parameters())}
    buffers = GradientBuffers(groups)
    backward(plain, 0)
    for starts in (False, True, False):
        if starts:
            buffers.start()
            backward(buffered, 5)
        drop_gradients(groups)
        backward(buffered, 0)
        assert torch.equal(buffered.weight.grad, plain.weight.grad) and not is_in(buffered.weight.grad, buffers)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_gone_in_the_next_step(value):
    plain, buffered = twins()
    buffers = GradientBuffers({"all": list(buffered.parameters())})
    buffers.start()
    backward(buffered, 0)
    buffered.weight.grad[2, 3] = value
    buffers.start()
    backward(buffered, 1)
    backward(plain, 1)
    assert torch.equal(buffered.weight.grad, plain.weight.grad)


def test_their_memory_goes_with_them_and_the_model_trains_on_without():
    layer = nn.Linear(5, 7)
    buffers = GradientBuffers({"all": list(layer.parameters())})
    buffers.start()
    backward(layer, 0)
    layer.zero_grad()
    flat = weakref.ref(buffers.flat[0])
    del buffers
    gc.collect()
    assert flat() is None
    backward(layer, 0)
    assert layer.weight.grad.any()
