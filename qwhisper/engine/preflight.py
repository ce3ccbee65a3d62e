"""Tests whether an attention kernel is right on this machine, before a run relies on it.

Its result and gradients are compared with explicit softmax attention in fp32, at the model's own head size, grouping,
window and dtype. Backward passes can be silently wrong: if length % 128 = 64 and a row's log-sum-exp is under -88.7,
cuDNN's gives NaN in the gradient of the queries (pytorch#196678), and elsewhere gradients that are wrong by a factor.
So half of the heads have ordinary scores, and half a log-sum-exp under -100.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwhisper.errors import first_line
from qwhisper.memory import is_out_of_memory

LENGTHS = (64, 192, 128, 65, 1)
LOW_SCORE = -110.0  # of every pair: log-sum-exp is under -100 for rows of up to e^10 tokens
RESULTS = ("the result", "the gradient of queries", "the gradient of keys", "the gradient of values")
SHORT_WINDOW = 100  # a model's own window is seldom shorter than rows of 192 tokens
# The reference needs [length, length] in fp32 for each head.
LONGEST = {"cpu": 256, "cuda": 4096}
# `_one_head` counts two roundings. A kernel may make four: probabilities, the scores' gradient, each head's result, the
# sum over a group. The bound is twice that; torch's kernels on CPU reach 1.3 of the 4.
SLACK = 4.0


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention of a model, as its kernel is called.

    groups: query heads that share a key head. window: tokens that a query attends to, itself included. trained: whether
    gradients pass through it.
    """

    owner: str
    groups: int
    head_dim: int
    scale: float
    causal: bool
    window: int | None
    dtype: torch.dtype
    device: torch.device
    trained: bool

    def allowed(self, length: int) -> Tensor:
        """[length, length] bool, True where a query may attend."""
        distance = torch.arange(length, device=self.device)[:, None] - torch.arange(length, device=self.device)
        if not self.causal:
            return torch.ones_like(distance, dtype=torch.bool)
        return (distance >= 0) & (distance < (self.window or length))


@dataclass(frozen=True)
class Layout:
    """How a tensor holds sequences: end to end in one packed row, or one padded row each."""

    lengths: tuple[int, ...]
    packed: bool
    padding_side: str = "right"

    @property
    def tokens(self) -> int:
        return sum(self.lengths) if self.packed else max(self.lengths)

    def spans(self) -> list[tuple[int, slice]]:
        """Row and columns of each sequence."""
        if self.packed:
            borders = itertools.pairwise(itertools.accumulate(self.lengths, initial=0))
            return [(0, slice(start, end)) for start, end in borders]
        starts = [self.tokens - length if self.padding_side == "left" else 0 for length in self.lengths]
        return [(row, slice(s, s + n)) for row, (s, n) in enumerate(zip(starts, self.lengths, strict=True))]

    def real(self, device: torch.device) -> Tensor:
        """[rows, tokens] bool, False at padding."""
        real = torch.zeros(1 if self.packed else len(self.lengths), self.tokens, dtype=torch.bool, device=device)
        for span in self.spans():
            real[span] = True
        return real

    def mask(self, attention: Attention) -> Tensor | None:
        """[rows, 1, tokens, tokens] bool for a padded batch; None if plain causal attention is equal."""
        windowed = attention.window is not None and attention.window < self.tokens
        if len(set(self.lengths)) == 1 and not windowed:
            return None
        return self.real(attention.device)[:, None, None, :] & attention.allowed(self.tokens)

    def __str__(self) -> str:
        kind = "packed row" if self.packed else f"batch padded on the {self.padding_side}"
        if not self.packed and len(set(self.lengths)) == 1:
            kind = "batch without padding"
        return f"{kind}, {' + '.join(map(str, self.lengths))} tokens"


# (query, key, value [rows, heads, tokens, head_dim], layout, attention) -> [rows, tokens, heads, head_dim]
Kernel = Callable[[Tensor, Tensor, Tensor, Layout, Attention], Tensor]


@dataclass(frozen=True)
class Fault:
    """case: attention, layout and scores of the trial. what: which tensor is wrong, and by how much."""

    case: str
    what: str


def trials(attention: Attention, longest: int, *, packed: bool) -> list[tuple[Attention, Layout]]:
    """The test cases of a kernel. longest: tokens of the run's longest sequence; tests have at most LONGEST tokens."""
    longest = max(1, min(longest, LONGEST.get(attention.device.type, LONGEST["cpu"])))
    short = replace(attention, window=attention.window and min(attention.window, SHORT_WINDOW))
    if packed:
        return [(short, Layout(LENGTHS, True)), (attention, Layout((longest, 64), True))]
    padded = [Layout((n, n // 2 + 1), False, side) for n in (64, 65, 128, 192) for side in ("right", "left")]
    plain = [Layout((n,), False) for n in (64, 65, 192)]
    return [(short, layout) for layout in padded + plain] + [(attention, Layout((longest, longest // 2 + 1), False))]


def first_fault(kernel: Kernel, cases: Iterable[tuple[Attention, Layout]]) -> Fault | None:
    """The first case that the kernel can't run or gets wrong; None if it is right in all.

    Changes no random generator, and leaves no graph and no gradient behind.
    """
    return next((fault for case in cases if (fault := _fault(kernel, *case)) is not None), None)


def _fault(kernel: Kernel, attention: Attention, layout: Layout) -> Fault | None:
    # Only generation pads on the left, and it has no backward pass.
    backward = attention.trained and layout.padding_side == "right"
    query, key, value, grad = make_inputs(attention, layout)
    leaves = [x.requires_grad_(backward) for x in (query, key, value)]
    case = f"{name_of(attention)}, {layout}"
    try:
        with torch.set_grad_enabled(backward):
            out = kernel(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), layout, attention)
        got = [out.detach(), *(torch.autograd.grad(out, leaves, grad) if backward else ())]
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return Fault(case, f"it does not run here ({first_line(error)})")
    query, key, value, grad = (x.detach().float() for x in (query, key, value, grad))
    right = reference(query, key, value, grad if backward else None, attention, layout)
    for name, tensor, (expected, rounding) in zip(RESULTS, got, right, strict=False):
        halves = zip(tensor.chunk(2, dim=2), expected.chunk(2, dim=2), rounding.chunk(2, dim=2), strict=True)
        for scores, half in zip(("ordinary scores", "log-sum-exp under -100"), halves, strict=True):
            if what := _difference(*half, dtype=attention.dtype):
                return Fault(f"{case}, {scores}", f"{name} {what}")
    return None


def name_of(attention: Attention) -> str:
    dtype = str(attention.dtype).removeprefix("torch.")
    window = f", window {attention.window}" if attention.window else ""
    return f"{attention.owner} ({dtype}, heads of {attention.head_dim} in groups of {attention.groups}{window})"


def _difference(got: Tensor, expected: Tensor, rounding: Tensor, *, dtype: torch.dtype) -> str | None:
    """What is wrong with `got`, or None. rounding: the error bounds from `reference`."""
    finite = torch.isfinite(got)
    if not finite.all():
        rows = int((~finite).any(-1).sum())
        return f"is not finite in {rows} of {got[..., 0].numel()} rows"
    bound = SLACK * rounding + torch.finfo(dtype).tiny
    off = (got.float() - expected).abs()
    worst = (off / bound).argmax()
    if off.flatten()[worst] <= bound.flatten()[worst]:
        return None
    numbers = (x.flatten()[worst] for x in (got, expected, bound))
    return "is {:.4g} instead of {:.4g}, where rounding explains {:.2g}".format(*map(float, numbers))


def make_inputs(
    attention: Attention, layout: Layout, score: float = LOW_SCORE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and the result's gradient, [rows, tokens, heads, head_dim] in the attention's dtype.

    The first of two key heads has scores of mean 0 and variance 1, the second scores near `score`. The gradient is 0 at
    padding, as in training.
    """
    generator = torch.Generator().manual_seed(0)
    real = layout.real(torch.device("cpu"))

    def noise(heads: int) -> Tensor:
        return torch.randn(*real.shape, heads, attention.head_dim, generator=generator)

    groups = attention.groups
    query, key, value, grad = noise(2 * groups), noise(2), noise(2), noise(2 * groups)
    level = math.sqrt(abs(score) / math.sqrt(attention.head_dim))
    query[:, :, groups:] = 0.02 * query[:, :, groups:] + level
    key[:, :, 1:] = 0.02 * key[:, :, 1:] + math.copysign(level, score)
    query /= attention.scale * math.sqrt(attention.head_dim)
    grad *= real[..., None, None]
    query, key, value, grad = (x.to(attention.device, attention.dtype) for x in (query, key, value, grad))
    return query, key, value, grad


def reference(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor | None, attention: Attention, layout: Layout
) -> list[tuple[Tensor, Tensor]]:
    """(value, error) of the result and, with `grad`, of the gradients of queries, keys and values.

    All [rows, tokens, heads, head_dim] fp32. error: the part that rounding in the attention's dtype explains; infinite
    for the result at padding, which is never read.
    """
    shapes = (query, query, key, value) if grad is not None else (query,)
    found = [(torch.zeros_like(x), torch.zeros_like(x)) for x in shapes]
    for (row, columns), head in itertools.product(layout.spans(), range(query.shape[2])):
        at, shared = (row, columns, head), (row, columns, head // attention.groups)
        part = _one_head(query[at], key[shared], value[shared], None if grad is None else grad[at], attention)
        for sums, parts, place in zip(found, part, (at, at, shared, shared), strict=False):
            for total, share in zip(sums, parts, strict=True):
                total[place] += share
    found[0][1][~layout.real(query.device)] = math.inf
    return found


def _one_head(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor | None, attention: Attention
) -> list[tuple[Tensor, Tensor]]:
    """softmax(scale Q K^T) V and its gradients, each [length, head_dim] fp32, with their errors.

    The errors are a first-order analysis of a kernel that rounds the probabilities P, the scores' gradient and its
    results to its dtype (eps), and sums in fp32 (eps32). |.| is elementwise. The error of a score is
    head_dim eps32 scale |q| |k|; relative to itself, that of a probability is r = eps + that + length eps32, and that
    of the result is r P |V|. The scores' gradient is P (dP - D), with dP = dO V^T and D = rowsum(dO O), which kernels
    compute from the rounded O: its error is r P (|dP| + rowsum |dO| |O|), plus that of dP's sum in fp32. Products with
    it carry this error on.
    """
    scale, head_dim = attention.scale, attention.head_dim
    eps, eps32 = torch.finfo(attention.dtype).eps, torch.finfo(torch.float32).eps
    allowed = attention.allowed(len(query))
    p = torch.softmax((query @ key.T * scale).masked_fill_(~allowed, -math.inf), dim=-1)
    out = p @ value
    largest_score = scale * query.norm(dim=-1, keepdim=True) * key.norm(dim=-1).max()
    p_error = p * (eps + eps32 * (len(query) + head_dim * largest_score))
    results = [(out, p_error @ value.abs())]
    if grad is not None:
        dp = grad @ value.T
        ds = p * (dp - (grad * out).sum(-1, keepdim=True))
        sums = grad.norm(dim=-1, keepdim=True) * value.norm(dim=-1)
        ds_error = p_error * (dp.abs() + (grad * out).abs().sum(-1, keepdim=True)) + p * (head_dim * eps32) * sums
        results += [
            (ds @ key * scale, ds_error @ key.abs() * scale),
            (ds.T @ query * scale, ds_error.T @ query.abs() * scale),
            (p.T @ grad, p_error.T @ grad.abs()),
        ]
    return results
