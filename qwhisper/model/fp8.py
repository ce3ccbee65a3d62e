"""Frozen linears in fp8 (float8_e4m3fn): a byte for each weight and an fp32 scale for each output feature.

Forward: y = x W^T. Rows of x, one a token, are quantised with a scale of their own, and the product is taken in fp8.
Backward: dx = dy W from the same copy of W. A scale of W belongs to an output feature, over which this product sums, so
it can't be applied afterwards: it is multiplied into dy, whose rows are then quantised as those of x are. No activation
is saved, since a frozen weight has no gradient.

fp8 tensor cores want the index that is summed over to be the fastest in memory, for both factors (sm_89, sm_90 and
sm_120). W as it is stored, [out, in] row by row, fits the forward product, which a recomputing backward pass takes
twice; for dx a transposed copy of one layer's weight is made and freed again: 2 bytes of memory traffic a weight,
against 2 x tokens operations.

e4m3fn has no infinity; torch before 2.13 casts what is over 464 to NaN. Nothing need be clamped: |x| / scale is at most
448 up to fp32 rounding, since the scale is computed in fp32 from the row's largest value. A row that is not finite
gives a row that is not finite, for guards to see, and changes no other row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
# Added to each scale, so that a row of zeros does not divide by 0. Far below any other scale: gradients of a loss that
# is divided by thousands of tokens, times a weight's scale, are around 1e-12, where other implementations round them
# to 0. Added, not a maximum: Triton kernels with min or max may store fp8 values wrongly (triton#11111).
LEAST_SCALE = 1e-35
MULTIPLE = 16  # of both sizes of a matrix, for `_scaled_mm`

ROWWISE, TENSORWISE, DEQUANTISED = "fp8_rowwise", "fp8_tensorwise", "dequantised"


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns] as (values [rows, columns] float8_e4m3fn, scales [rows, 1] fp32), with x = values * scales.

    The relative error of a value is at most 2^-4, or its absolute one 2^-10 scales. Nothing waits for the device.
    """
    largest = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True, dtype=torch.float32)
    scales = largest / LARGEST + LEAST_SCALE
    return (x / scales).to(FLOAT8), scales


def dequantise(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scales, rounded once."""
    return (values.float() * scales).to(dtype)


def _rowwise(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    # use_fast_accum would sum in about 14 bits.
    return torch._scaled_mm(
        a, b.t(), scale_a=a_scales, scale_b=b_scales.t(), out_dtype=torch.bfloat16, use_fast_accum=False
    )


def _tensorwise(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    """The scales of rows are applied outside of the product, so that its values are those of `_rowwise`."""
    one = torch.ones((), device=a.device)
    product = torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=False)
    return product * a_scales * b_scales.t()


@dataclass(frozen=True)
class Product:
    """Both products of a layer, by one kernel. next: the kernel that replaces it if it is wrong.

    multiply: (a [m, k], a's scales [m, 1], b [n, k], b's scales [n, 1]) -> [m, n], the scaled a times the scaled b^T.
    None: the weight is dequantised, and activations are not quantised at all.
    """

    multiply: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None
    next: str | None

    def forward(self, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """x [tokens, in] times the weight [out, in] with scales [out, 1]: [tokens, out], in the dtype of x."""
        if self.multiply is None:
            return x @ dequantise(weight, scales, x.dtype).t()
        return self.multiply(*quantise_rows(x), weight, scales).to(x.dtype)

    def input_gradient(self, grad: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """grad [tokens, out] to [tokens, in], in its dtype."""
        if self.multiply is None:
            return grad @ dequantise(weight, scales, grad.dtype)
        ones = torch.ones(weight.shape[1], 1, device=weight.device)
        folded = quantise_rows(grad * scales.t())  # in fp32: an fp16 gradient times a scale would be 0
        return self.multiply(*folded, _transposed(weight), ones).to(grad.dtype)


def _transposed(weight: Tensor) -> Tensor:
    # As plain bytes, which no compiler converts on the way.
    return weight.view(torch.uint8).t().contiguous().view(FLOAT8)


PRODUCTS = {
    ROWWISE: Product(_rowwise, next=TENSORWISE),
    TENSORWISE: Product(_tensorwise, next=DEQUANTISED),
    DEQUANTISED: Product(None, next=None),
}


def product_for(capability: tuple[int, int] | None, out_features: int, in_features: int) -> str:
    """The kernel for a layer of this size. capability: of an NVIDIA card, (9, 0) for an H100; None for anything else.

    Row-wise scales are for sm_90 alone: on sm_89 that kernel of torch before 2.12 ignores the stream (pytorch#177651),
    on sm_120 it fails (pytorch#192707).
    """
    if capability is None or capability < (8, 9) or out_features % MULTIPLE or in_features % MULTIPLE:
        return DEQUANTISED
    return ROWWISE if capability[0] == 9 else TENSORWISE


def _capability(device: torch.device) -> tuple[int, int] | None:
    # AMD's older cards have another fp8 format.
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else None


@torch.library.custom_op("qwhisper::product_fp8", mutates_args=())
def product_fp8(x: Tensor, weight: Tensor, scales: Tensor, product: str, transposed: bool) -> Tensor:
    """`Product.forward`, or `Product.input_gradient` if `transposed`, of the product with this name.

    One operation: traced by torch 2.11, the gradient of a product in fp8 is 0. And a compiler would keep a dequantised
    weight from the forward pass for the backward pass.
    """
    kernel = PRODUCTS[product]
    return kernel.input_gradient(x, weight, scales) if transposed else kernel.forward(x, weight, scales)


@product_fp8.register_fake
def _(x, weight, scales, product, transposed):
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 0])


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor, product: str) -> Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.product = product
        return product_fp8(x, weight, scales, product, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scales = ctx.saved_tensors
        return product_fp8(grad, weight, scales, ctx.product, True), None, None, None


class Float8Linear(nn.Linear):
    """A frozen linear in fp8. weight: [out, in] float8_e4m3fn; weight_scale: [out, 1] fp32.

    compute_dtype: of the activations, and the name where PEFT looks for LoRA's dtype. product: a name of PRODUCTS.
    A move to another device takes the weights along; a cast, such as `model.bfloat16()`, leaves them as they are.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: Any = None) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.requires_grad_(False)
        scale = torch.ones(out_features, 1, dtype=torch.float32, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.compute_dtype = dtype
        self.product = DEQUANTISED  # right everywhere; `choose_products` sets the fast one

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in the dtype of x."""
        y = _Frozen.apply(x.reshape(-1, self.in_features), self.weight, self.weight_scale, self.product)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float8Linear":
        kept = {name: p for name, p in self.named_parameters(recurse=False) if p.dtype in _BITS and name != "bias"}
        for parameter in kept.values():
            parameter.data = parameter.data.view(_BITS[parameter.dtype])  # casts leave integers alone
        try:
            return super()._apply(fn, recurse)
        finally:
            for name in kept:
                parameter = getattr(self, name)
                parameter.data = parameter.data.view(FLOAT8 if parameter.dtype == torch.uint8 else torch.float32)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.dtype != self.weight.dtype:  # copying would cast it, without a scale
            errors.append(f"{prefix}weight is {weight.dtype}, and this layer is in fp8: load the model without fp8")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


_BITS = {FLOAT8: torch.uint8, torch.float32: torch.int32}


def float8_layers(model: nn.Module) -> dict[str, Float8Linear]:
    """The model's layers in fp8, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Float8Linear)}


def choose_products(model: nn.Module) -> None:
    """Set each fp8 layer's kernel by the device that it is on."""
    for layer in float8_layers(model).values():
        layer.product = product_for(_capability(layer.weight.device), layer.out_features, layer.in_features)
