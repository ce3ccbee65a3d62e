"""Attention within the segments of a row by kernels of this package, for cards and models that they are made for.

As operators of torch they stand in compiled graphs and in CUDA graphs: no wait for the device, and grids that follow
from shapes alone. `model.segment_blocks` makes the table that says which rows belong together. `why_not` checks a card
once in a process; `model.attention` then uses other kernels.
"""

import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qwhisper.model.segment_blocks import BLOCK_ROWS

DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """Tile of a kernel. rows: that a program owns, a divisor of BLOCK_ROWS. step: rows of the other side that a turn of
    its loop takes. stages: turns whose loads are under way at once.
    """

    rows: int
    step: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Of the three kernels: result; gradient of queries; gradients of keys and values."""

    forward: Tile
    query: Tile
    key: Tile


# By the largest head_dim that they serve. The first need up to 227 KB of shared memory in a block of threads (compute
# capability 8.0 has 163 KB, 9.0 and 10.0 have 227), the second fit into the 99 KB of 8.6, 8.9 and 12.0.
LARGE_TILES = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
}
SMALL_TILES = {
    64: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    256: Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}


def tiles(head_dim: int, capability: tuple[int, int]) -> Tiles | None:
    """The tiles for a head size on cards of a compute capability; None if there are none."""
    if head_dim > LARGEST_HEAD or capability < (8, 0):  # before 8.0 cards have no bf16 products
        return None
    table = LARGE_TILES if capability == (8, 0) or capability[0] in (9, 10) else SMALL_TILES
    return next(found for largest, found in table.items() if head_dim <= largest)


@torch.compiler.assume_constant_result
def why_not(head_dim: int, device: int) -> str | None:
    """Why these kernels can't run with heads of this size on a CUDA device; None if they can.

    The first call starts a kernel of one element, without a wait: this needs Triton, a C compiler and Python's headers.
    """
    return _why_not(head_dim, device)  # a cached function itself is no constant to torch.compile


@functools.cache
def _why_not(head_dim: int, device: int) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if tiles(head_dim, capability) is None:
        return f"no tiles for heads of {head_dim} on compute capability {capability[0]}.{capability[1]}"
    try:
        start_a_kernel(device)
    except Exception as error:  # what a missing compiler, header or driver raises differs by version
        first, *_ = str(error).split("\n")
        return f"Triton does not run ({type(error).__name__}: {first})"
    return None


def start_a_kernel(device: int) -> None:
    """Compile and start a kernel of one element."""
    from qwhisper.model import segment_kernels

    with torch.cuda.device(device), unset_fake_temporarily():  # also while a graph is traced
        segment_kernels.write_one[(1,)](torch.empty(1, device="cuda"))


def segments_can_run(query: Tensor, dropout: float = 0.0) -> bool:
    """Whether `segment_attention` takes these queries [..., head_dim] on their device."""
    if not query.is_cuda or query.dtype not in DTYPES or dropout or query.shape[-1] > LARGEST_HEAD:
        return False
    device = torch.cuda.current_device() if query.device.index is None else query.device.index
    return why_not(query.shape[-1], device) is None


@torch.library.custom_op("qwhisper::segment_attention", mutates_args=())
def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """softmax(scale Q K^T) V within each segment, for grouped heads.

    query: [tokens, heads, head_dim], bf16 or fp16; key, value: [tokens, key heads, head_dim]. blocks: `segment_blocks`
    of the borders, on the device. scale: above 0. window: how many tokens a query attends to, itself included; 0: all.
    It counts for causal attention alone. Returns the result [tokens, heads, head_dim] and, for the backward pass, the
    base-2 logarithms of the rows' sums of exponentials, fp32 [heads, tokens].
    """
    query, key, value = (_dense_heads(x) for x in (query, key, value))
    tokens, heads, _ = query.shape
    out = query.new_empty(query.shape)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    _launch(
        "forward", heads, query, key, blocks, causal, window,
        query, key, value, out, lse, blocks, *_strides(query, key, value), out.stride(0), tokens, scale * LOG2_E,
    )  # fmt: skip
    return out, lse


@segment_attention.register_fake
def _(query, key, value, blocks, scale, causal, window):
    tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("qwhisper::segment_attention_backward", mutates_args=())
def segment_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, blocks: Tensor,
    scale: float, causal: bool, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, laid out as [tokens, heads, head_dim]. grad: the gradient of `out`."""
    grad, query, key, value = (_dense_heads(x) for x in (grad, query, key, value))
    (tokens, heads, _), key_heads = query.shape, key.shape[1]
    query_grad, key_grad, value_grad = (x.new_empty(x.shape) for x in (query, key, value))
    delta = torch.empty_like(lse)
    strides, scales = _strides(grad, query, key, value), (scale, scale * LOG2_E)
    _launch(
        "backward_query", heads, query, key, blocks, causal, window,
        grad, query, key, value, out, lse, delta, query_grad, blocks, *strides, out.stride(0), tokens, *scales,
    )  # fmt: skip
    _launch(
        "backward_key", key_heads, query, key, blocks, causal, window,
        grad, query, key, value, lse, delta, key_grad, value_grad, blocks, *strides, key_grad.stride(0), tokens,
        *scales,
    )  # fmt: skip
    return query_grad, key_grad, value_grad


@segment_attention_backward.register_fake
def _(grad, query, key, value, out, lse, blocks, scale, causal, window):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _remember(ctx, inputs, output) -> None:
    query, key, value, blocks, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *output, blocks)


def _gradients(ctx, grad, _):
    grads = segment_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None


segment_attention.register_autograd(_gradients, setup_context=_remember)


def _dense_heads(x: Tensor) -> Tensor:
    """The kernels take rows and heads of any stride, but each head's numbers side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _launch(kernel: str, heads: int, query: Tensor, key: Tensor, blocks: Tensor, causal: bool, window: int, *arguments):
    """heads: that the programs of the kernel are spread over."""
    from qwhisper.model import segment_kernels

    head_dim = query.shape[-1]
    tile = getattr(_tiles_of(query), KERNELS[kernel])
    place = torch.cuda.device(query.device) if query.is_cuda else nullcontext()  # Triton launches on the current device
    with place:
        getattr(segment_kernels, kernel)[len(blocks) * (BLOCK_ROWS // tile.rows), heads](
            *arguments,
            groups=query.shape[1] // key.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, 1 << (head_dim - 1).bit_length()),
            CAUSAL=causal,
            WINDOW=window if causal else 0,
            BLOCK_ROWS=BLOCK_ROWS,
            TILE=tile.rows,
            STEP=tile.step,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


KERNELS = {"forward": "forward", "backward_query": "query", "backward_key": "key"}  # which of the `Tiles`


def _tiles_of(query: Tensor) -> Tiles:
    # Triton's interpreter runs the kernels on a CPU, for tests.
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (8, 6)
    found = tiles(query.shape[-1], capability)
    if found is None:
        raise RuntimeError(f"segment attention has no tiles for heads of {query.shape[-1]} on {capability}")
    return found
