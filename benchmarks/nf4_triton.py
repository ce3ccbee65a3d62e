"""One kernel in Triton in place of bitsandbytes' three, which nf4_layers.py compares with them. Import needs Triton."""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState
from torch import Tensor


@triton.jit
def _dequantise(
    packed, absmax, nested_code, nested_absmax, offset, code, out, weights,
    BLOCK: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)  # bytes, of two weights each
    inside = at < weights // 2
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    block = at // (BLOCKSIZE // 2)
    inner = tl.load(nested_code + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
    scale = inner * tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=inside, other=0.0) + tl.load(offset)
    high, low = tl.load(code + (byte >> 4)) * scale, tl.load(code + (byte & 15)) * scale
    place = 2 * first + tl.arange(0, 2 * BLOCK)
    tl.store(out + place, tl.interleave(high, low).to(out.dtype.element_ty), mask=place < weights)


def dequantise(packed: Tensor, state: QuantState, block: int, warps: int) -> Tensor:
    """A weight with nested scales in bf16. block: bytes of a program."""
    out = torch.empty(state.shape, dtype=torch.bfloat16, device=packed.device)
    nested, weights = state.state2, out.numel()
    _dequantise[(triton.cdiv(weights // 2, block),)](
        packed, state.absmax, nested.code, nested.absmax, state.offset, state.code, out, weights,
        BLOCK=block, BLOCKSIZE=state.blocksize, NESTED_BLOCKSIZE=nested.blocksize, num_warps=warps,
    )  # fmt: skip
    return out
