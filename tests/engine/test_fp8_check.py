import dataclasses
import math

import pytest
import torch
from torch import nn

from qwhisper.engine import fp8_check
from qwhisper.engine.fp8_check import Case, cases, check_products, fault_of
from qwhisper.errors import NumericalError
from qwhisper.model import fp8
from qwhisper.model.fp8 import DEQUANTISED, PRODUCTS, ROWWISE, TENSORWISE, Float8Linear, quantise_rows

pytestmark = pytest.mark.usefixtures("rowwise_product")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """The CPU's own `_scaled_mm` needs a second for 10 million products."""
    monkeypatch.setattr(fp8_check, "ROWS", (33,))


def make_model(product: str = ROWWISE, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Three layers in fp8, of two sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Float8Linear(size, out, False, dtype) for size, out in ((32, 16), (16, 32), (32, 16))))
    for layer in model:
        weight, scale = quantise_rows(torch.randn(layer.out_features, layer.in_features) * 0.02)
        layer.weight, layer.weight_scale = (nn.Parameter(x, requires_grad=False) for x in (weight, scale))
        layer.product = product
    return model


def plant(monkeypatch, wrong, *names: str) -> list:
    """Put `wrong(right result, number of the call)` in the place of kernels; returns a list that grows with calls."""
    calls: list[str] = []
    for name in names:
        right = PRODUCTS[name].multiply

        def kernel(a, a_scales, b, b_scales, right=right, name=name):
            calls.append(name)
            return wrong(right(a, a_scales, b, b_scales), len(calls))

        monkeypatch.setitem(fp8.PRODUCTS, name, dataclasses.replace(PRODUCTS[name], multiply=kernel))
    return calls


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_right_products_give_no_finding_and_leave_no_trace(product, dtype):
    model = make_model(product, dtype)
    state = torch.get_rng_state()
    assert len(list(cases(model))) == 2
    assert check_products(model) == [] and {layer.product for layer in model} == {product}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_fp8_has_nothing_to_check():
    assert check_products(nn.Linear(3, 3)) == []


def nan_in_one_row(y, call):
    y[5, 3] = math.nan
    return y


def twice(y, call):
    return 2 * y


def one_wrong_tile(y, call):
    y[-9:-1, -8:] = 0
    return y


def hides_nan(y, call):
    return y.nan_to_num(0)


def leaks_between_rows(y, call):
    return y + y[-1:] if len(y) > 1 else y


def nan_in_every_fifth_call(y, call):
    return nan_in_one_row(y, call) if call % 5 == 0 else y


def wrong_gradient(y, call):
    return 1.5 * y if call % 2 == 0 else y


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (nan_in_one_row, "the result is not finite in 1 of 32 rows"),
        (twice, "the result is "),
        (one_wrong_tile, "the result is 0 instead of"),
        (hides_nan, "the result is finite for a row of NaN"),
        (leaks_between_rows, "the result is not finite in 32 of 32 rows"),
        (nan_in_every_fifth_call, "is not finite in 1 of 32 rows"),
        (wrong_gradient, "the input gradient is "),
    ],
)
def test_a_wrong_product_is_named_and_replaced_by_the_next(monkeypatch, wrong, words):
    model = make_model()
    plant(monkeypatch, wrong, ROWWISE)
    (found,) = check_products(model)
    assert (found.kernel, found.replaced_by) == (ROWWISE, TENSORWISE)
    assert found.what.startswith(words) or words in found.what
    assert found.case in ("0 [16, 32], 33 rows in bfloat16", "1 [32, 16], 33 rows in bfloat16")
    assert {layer.product for layer in model} == {TENSORWISE}


def test_a_product_that_does_not_run_here_is_replaced(monkeypatch):
    def fails(y, call):
        raise NotImplementedError("row-wise scales need compute capability 9.0")

    model = make_model()
    plant(monkeypatch, fails, ROWWISE, TENSORWISE)
    assert [found.replaced_by for found in check_products(model)] == [TENSORWISE, DEQUANTISED]


def test_out_of_memory_is_no_fault_of_the_kernel(monkeypatch):
    def out_of_memory(y, call):
        raise torch.OutOfMemoryError("CUDA out of memory")

    plant(monkeypatch, out_of_memory, ROWWISE)
    with pytest.raises(torch.OutOfMemoryError):
        check_products(make_model())


def test_without_a_right_product_the_run_ends(monkeypatch):
    model = make_model(DEQUANTISED)
    wrong = dataclasses.replace(
        PRODUCTS[DEQUANTISED], multiply=lambda a, a_scales, b, b_scales: a.float() @ b.float().T
    )
    monkeypatch.setitem(fp8.PRODUCTS, DEQUANTISED, wrong)
    with pytest.raises(NumericalError, match="leave out --load_in_fp8"):
        check_products(model)


def test_the_largest_layers_of_8b_are_within_the_bound():
    """The bound grows with the sum's length as rounding does."""
    layer = Float8Linear(12288, 16, False, torch.bfloat16)
    weight, scale = quantise_rows(torch.randn(16, 12288, generator=torch.Generator().manual_seed(0)) * 0.02)
    layer.weight, layer.weight_scale = (nn.Parameter(x, requires_grad=False) for x in (weight, scale))
    for product in PRODUCTS.values():
        assert fault_of(product, Case("down_proj", layer, 8, torch.bfloat16)) is None
