"""Tests whether the fp8 products of a model are right on this machine, and replaces those that are not.

Each size of matrix that the model has is tested with its own weights, forward and for the input gradient, against an
fp32 product of the same quantised values. Among the rows are zeros, tiny ones, one with a huge outlier and one that is
not finite, which no other row may notice.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwhisper.engine.kernels import WrongKernel
from qwhisper.engine.preflight import Fault
from qwhisper.errors import NumericalError, first_line
from qwhisper.memory import is_out_of_memory
from qwhisper.model.fp8 import PRODUCTS, Float8Linear, Product, dequantise, float8_layers, quantise_rows

ROWS = (257, 1024)  # kernels work in tiles of 64 to 256 rows
REPEATS = 3  # a race shows in some runs only
# Tensor cores of sm_90 add fp8 products in about 14 bits and in fp32 every 128; the bound is four times that.
ACCUMULATION = 2.0**-11


@dataclass(frozen=True)
class Case:
    """One layer and the dtype of its activations. name: for messages."""

    name: str
    layer: Float8Linear
    rows: int
    dtype: torch.dtype

    def __str__(self) -> str:
        sizes = f"[{self.layer.out_features}, {self.layer.in_features}]"
        return f"{self.name} {sizes}, {self.rows} rows in {str(self.dtype).removeprefix('torch.')}"


def check_products(model: nn.Module, before_trial: Callable[[], None] = lambda: None) -> list[WrongKernel]:
    """Test the kernel of every fp8 layer on its device; in this model, replace one that is wrong by the next.

    before_trial: may raise to end the check. Changes neither weights nor random generators. Raises NumericalError if no
    kernel is right.
    """
    findings: list[WrongKernel] = []
    while (wrong := _first_wrong(model, before_trial)) is not None:
        name, fault = wrong
        replaced_by = PRODUCTS[name].next
        if replaced_by is None:
            raise NumericalError(
                f"no product of a weight in fp8 is right on this machine; the last, {name}: {fault.what}; "
                f"{fault.case}. Update PyTorch or the driver, or leave out --load_in_fp8"
            )
        for layer in float8_layers(model).values():
            layer.product = replaced_by if layer.product == name else layer.product
        findings.append(WrongKernel(name, fault.case, fault.what, replaced_by))
    return findings


def _first_wrong(model: nn.Module, before_trial: Callable[[], None]) -> tuple[str, Fault] | None:
    for case in cases(model):
        for _ in range(REPEATS):
            before_trial()
            if (fault := fault_of(PRODUCTS[case.layer.product], case)) is not None:
                return case.layer.product, fault
    return None


def cases(model: nn.Module) -> Iterator[Case]:
    """One layer of each size, kernel and device."""
    layers: dict[tuple, tuple[str, Float8Linear]] = {}
    for name, layer in float8_layers(model).items():
        if not layer.weight.is_meta:  # offloaded to the host: the weight is elsewhere
            size = (*layer.weight.shape, layer.product, layer.weight.device, layer.compute_dtype)
            layers.setdefault(size, (name.removesuffix(".base_layer"), layer))
    for name, layer in layers.values():
        for rows in ROWS if layer.weight.is_cuda else ROWS[:1]:
            yield Case(name, layer, rows, layer.compute_dtype)


@torch.no_grad()
def fault_of(product: Product, case: Case) -> Fault | None:
    """What is wrong with a product, or None."""
    weight, scales = case.layer.weight, case.layer.weight_scale
    x, grad = (make_rows(case, size) for size in (case.layer.in_features, case.layer.out_features))
    try:
        got = product.forward(x, weight, scales), product.input_gradient(grad, weight, scales)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return Fault(str(case), f"it does not run here ({first_line(error)})")
    exact = dequantise(weight, scales, torch.float32)
    if product.multiply is None:
        pairs: Iterable[tuple[Tensor, Tensor]] = ((x.float(), exact.t()), (grad.float(), exact))
    else:
        folded = _as_quantised(grad * scales.t())
        pairs = ((_as_quantised(x), exact.t()), (folded, weight.float()))
    for name, values, (a, b) in zip(("the result", "the input gradient"), got, pairs, strict=True):
        rounded = torch.finfo(case.dtype).eps if product.multiply is None else 0.0  # of the weight
        if what := _difference(values, a, b, rounded):
            return Fault(str(case), f"{name} {what}")
    return None


def make_rows(case: Case, size: int) -> Tensor:
    """[rows, size]: ordinary values; a row of zeros, of 1e-6, with one value of 1e4 (1e3 in fp16), and last of NaN."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(case.rows, size, generator=generator)
    rows[1] = 0
    rows[2] *= 1e-6
    rows[3, size // 2] = 1e3 if case.dtype == torch.float16 else 1e4
    rows[-1] = torch.nan
    return rows.to(case.layer.weight.device, case.dtype)


def _as_quantised(x: Tensor) -> Tensor:
    return dequantise(*quantise_rows(x), torch.float32)


def _difference(got: Tensor, a: Tensor, b: Tensor, rounded: float) -> str | None:
    """What is wrong with `got` as the product of a and b, of which the last row is NaN.

    rounded: relative rounding of b in the product.
    """
    if torch.isfinite(got[-1]).any():
        return "is finite for a row of NaN"
    got, a = got[:-1], a[:-1]
    if not (finite := torch.isfinite(got)).all():
        return f"is not finite in {int((~finite).any(-1).sum())} of {len(got)} rows"
    expected, sizes = a @ b, a.abs() @ b.abs()
    # The result is rounded twice, in bf16 or coarser, by half an eps each.
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(torch.bfloat16).eps)
    bound = eps * expected.abs() + (ACCUMULATION + rounded) * sizes + torch.finfo(got.dtype).tiny
    off = (got.float() - expected).abs()
    worst = (off / bound).argmax()
    if off.flatten()[worst] <= bound.flatten()[worst]:
        return None
    numbers = (tensor.flatten()[worst] for tensor in (got, expected, bound))
    return "is {:.4g} instead of {:.4g}, where rounding explains {:.2g}".format(*map(float, numbers))
