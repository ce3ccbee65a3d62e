"""Linears in 4 bits: the weight is dequantised for a matrix product, and kept no longer than one layer's backward pass.

A pass dequantises each weight once forward and once backward. With activations computed again in the backward pass that
would be three times; there the dequantised weights of one layer are kept from its second forward pass to the end of its
backward pass.

bitsandbytes quantises and dequantises. In place of its products, which differ between its versions, each product is one
operation that torch.compile does not look into: it would merge the dequantisation of the backward pass with that of the
forward pass, and so keep the whole model dequantised in between. The operation waits for no value on the device, so a
CUDA graph can capture it.

Imported only if a model is in 4 bits, because bitsandbytes is an optional package.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import bitsandbytes.nn
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor, nn

# Rows of an answer's next token, for which bitsandbytes multiplies without writing the dequantised weight to memory.
FEW_ROWS = 32


def dequantise(
    packed: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """A weight [out, in] of bf16, fp16 or fp32.

    packed: two weights a byte. absmax: of each block of `blocksize` weights, fp32; or uint8 with its own scales in
    nested: code [256], absmax of each block of `nested_blocksize`, offset []. shape: (out, in). quant_type: "nf4" or
    "fp4".
    """
    inner, offset = None, None
    if nested:
        code, scales, offset = nested
        inner = QuantState(absmax=scales, code=code, blocksize=nested_blocksize, dtype=torch.float32)
    state = QuantState(absmax, torch.Size(shape), None, blocksize, quant_type, dtype, offset, inner)
    return dequantize_4bit(packed.view(-1, 1), state)


@torch.library.custom_op("qwhisper::dequantised_4bit", mutates_args=())
def dequantised_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """`dequantise` as one operation."""
    return dequantise(packed, absmax, nested, shape, blocksize, nested_blocksize, quant_type, dtype)


@dequantised_4bit.register_fake
def _(packed, absmax, nested, shape, blocksize, nested_blocksize, quant_type, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.custom_op("qwhisper::product_4bit", mutates_args=())
def product_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    transposed: bool,
) -> Tensor:
    """x W^T, or x W if `transposed`, for the weight W [out, in] that `dequantise` gives in the dtype of x.

    x: [..., in], or [..., out] if `transposed`. Gradients flow to x alone, and no dequantised weight is saved for them.
    """
    weight = dequantise(packed, absmax, nested, shape, blocksize, nested_blocksize, quant_type, x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # the result has the dtype of x
        return torch.matmul(x, weight) if transposed else nn.functional.linear(x, weight)


@product_4bit.register_fake
def _(x, packed, absmax, nested, shape, blocksize, nested_blocksize, quant_type, transposed):
    return x.new_empty(*x.shape[:-1], shape[1] if transposed else shape[0])


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, packed, absmax, nested, *rest, transposed = inputs
    ctx.save_for_backward(packed, absmax, *nested)
    ctx.rest, ctx.transposed = rest, transposed


def _backward(ctx: Any, gradient: Tensor) -> tuple:
    packed, absmax, *nested = ctx.saved_tensors
    of_x = product_4bit(gradient, packed, absmax, nested, *ctx.rest, not ctx.transposed)
    return of_x, None, None, [None] * len(nested), *[None] * (len(ctx.rest) + 1)


product_4bit.register_autograd(_backward, setup_context=_save)


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """bitsandbytes' linear with our product, for any pass of more than a few rows. PEFT and accelerate know its name.

    recomputed: whether a training pass runs twice, the second time in the backward pass. Autograd then discards all
    that it would save in the first, so that the dequantised weight can be saved.
    """

    weight: bitsandbytes.nn.Params4bit
    recomputed: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out] of the same dtype, computed in `compute_dtype` if that is set."""
        if not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * x.shape[-1]:
            return super().forward(x)
        inputs = x if self.compute_dtype is None else x.to(self.compute_dtype)
        state, inner = self.weight.quant_state, self.weight.quant_state.state2
        nested = [] if inner is None else [inner.code, inner.absmax, state.offset]
        nested_blocksize = 0 if inner is None else inner.blocksize
        quantised = (
            self.weight, state.absmax, nested, state.shape, state.blocksize, nested_blocksize, state.quant_type
        )  # fmt: skip
        if self.recomputed and self.training:
            with torch.autocast(x.device.type, enabled=False):
                result = nn.functional.linear(inputs, dequantised_4bit(*quantised, inputs.dtype))
        else:
            result = product_4bit(inputs, *quantised, False)
        if self.bias is not None:
            result = result + self.bias.to(result.dtype)
        return result.to(x.dtype)


def adopt_4bit_linears(model: nn.Module, compute_dtype: torch.dtype | None = None) -> None:
    """Give all 4-bit linears of a model our forward pass. compute_dtype: None keeps that of each layer.

    The layout of their weights stays as it is: on a CPU with AVX-512 BF16 bitsandbytes would repack them in the first
    pass in evaluation mode, and fail if a size is no multiple of 32 (rows) or of its block of 64 (columns). Afterwards
    no gradient would pass through them, not even in training mode.
    """
    for module in model.modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        module.__class__ = Linear4bit
        module.support_avx512bf16_for_cpu = False
        if compute_dtype is not None:
            module.compute_dtype, module.compute_type_is_set = compute_dtype, True
        if hasattr(module, "_hf_hook"):  # accelerate's, which calls the forward pass that it found
            module._old_forward = MethodType(Linear4bit.forward, module)
