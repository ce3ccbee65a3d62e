"""Kernels in Triton for fp8 layers, which fp8_products.py compares with what the package does. Import needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwhisper.model.fp8 import FLOAT8, LARGEST, LEAST_SCALE


@triton.jit
def _quantise_row(x, values, scales, columns, LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    numbers = tl.load(x + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(numbers), axis=0) / LARGEST + LEAST
    tl.store(scales + row, scale)
    tl.store(values + row * columns + at, (numbers / scale).to(tl.float8e4nv), mask=at < columns)


@triton.jit
def _transpose(x, out, rows, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tile = tl.load(x + row[:, None] * columns + column[None, :], mask=inside)
    inside = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(out + column[:, None] * rows + row[None, :], tl.trans(tile), mask=inside)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`fp8.quantise_rows` of contiguous rows, one program a row."""
    rows, columns = x.shape
    values, scales = torch.empty_like(x, dtype=FLOAT8), torch.empty(rows, 1, device=x.device)
    block = triton.next_power_of_2(columns)
    warps = min(16, max(4, block // 1024))
    _quantise_row[(rows,)](x, values, scales, columns, LARGEST, LEAST_SCALE, BLOCK=block, num_warps=warps)
    return values, scales


def transposed(weight: Tensor, block: int = 64) -> Tensor:
    """A contiguous copy [in, out] of an fp8 weight [out, in]."""
    rows, columns = weight.shape
    out = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    grid = triton.cdiv(rows, block), triton.cdiv(columns, block)
    _transpose[grid](weight.view(torch.uint8), out, rows, columns, BLOCK=block, num_warps=4)
    return out.view(FLOAT8)
