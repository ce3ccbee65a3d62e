"""Attention kernels with the faults that real ones have had, planted into right ones of `qwhisper.model.attention`."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv

NAN_UNDER = -88.7  # log-sum-exp, see pytorch#196678


class _Spoiled(torch.autograd.Function):
    """Its input, whose gradient `spoil` has been at."""

    @staticmethod
    def forward(ctx, x: Tensor, spoil: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.spoil = spoil
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.spoil(grad), None


def _nan_rows(query: Tensor, key: Tensor, scale: float, lengths: Tensor) -> Tensor:
    """The queries, with NaN as gradient in rows of low log-sum-exp in sequences of a length that is 64 modulo 128.

    lengths: [tokens], of the sequence that each token belongs to.
    """
    with torch.no_grad():
        keys = repeat_kv(key, query.shape[1] // key.shape[1])
        low = (query @ keys.transpose(-1, -2) * scale).logsumexp(-1) < NAN_UNDER
    bad = low & (lengths % 128 == 64)
    return _Spoiled.apply(query, lambda grad: grad.masked_fill(bad[..., None], torch.nan))


def packed_with_nan_gradient(right):
    def kernel(query, key, value, borders, max_length, *, scale, **rest):
        lengths = borders.diff()
        lengths = lengths.repeat_interleave(lengths)
        return right(_nan_rows(query, key, scale, lengths), key, value, borders, max_length, scale=scale, **rest)

    return kernel


def padded_with_nan_gradient(right):
    def kernel(module, query, key, value, mask, *args, scaling, **rest):
        if mask is not None:
            lengths = torch.full(query.shape[2:3], query.shape[2])
            query = _nan_rows(query, key, scaling, lengths)
        return right(module, query, key, value, mask, *args, scaling=scaling, **rest)

    return kernel


def packed_with_large_gradient(right, factor: float = 8.0):
    def kernel(query, *args, **rest):
        return right(_Spoiled.apply(query, lambda grad: grad * factor), *args, **rest)

    return kernel


def packed_that_leaks(right):
    """The second sequence sees the last token of the first."""

    def kernel(query, key, value, borders, max_length, **rest):
        rest.pop("cu_seq_lens_host", None)
        out = right(query, key, value, borders, max_length, **rest)
        if len(borders) < 3:
            return out
        start, end = int(borders[1]) - 1, int(borders[2])
        stretch = (x[:, :, start:end] for x in (query, key, value))
        joined = right(*stretch, torch.tensor([0, end - start], dtype=torch.int32), end - start, **rest)
        return torch.cat([out[: start + 1], joined[1:], out[end:]])

    return kernel
