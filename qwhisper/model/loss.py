"""Cross-entropy of each supervised position, in chunks, with or without a teacher; and a plain reference of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

MAX_LOGITS_AT_ONCE = 2**26  # 64 Mi values, 256 MiB in fp32: about 440 positions of Qwen3's vocabulary
IGNORE_INDEX = -100


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits with Gemma 2's final_logit_softcapping."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def head_logits(hidden_states: Tensor, lm_head: nn.Module, softcap: float | None) -> Tensor:
    """fp32 logits [positions, vocabulary]; `softcap` is Gemma 2's final_logit_softcapping."""
    return capped(lm_head(hidden_states).float(), softcap)


@dataclass(frozen=True)
class Lesson:
    """The output of a teacher, the same language model reading the words, at the supervised positions.

    hidden_states: [positions, hidden], the teacher's last; any row at a position without a teacher. taught: bool
    [positions], True where there is a teacher. weight: from 0 to 1, of the divergence from the teacher; cross-entropy
    has the rest.
    """

    hidden_states: Tensor
    taught: Tensor
    weight: float


@dataclass(frozen=True)
class TokenLosses:
    """losses: fp32 [positions], 0 at padding. divergences: from the teacher, fp32 [positions], detached, in nats, 0
    where there is none; None without a lesson. last_logits: detached logits [positions, vocabulary] of the last chunk,
    of any dtype, before `softcap`.
    """

    losses: Tensor
    divergences: Tensor | None
    last_logits: Tensor


# (logits [positions, vocabulary], targets, softcap, of the teacher: logits, taught and weight) -> see `of_chunk`
OfChunk = Callable[..., tuple[Tensor, Tensor, Tensor]]


def of_chunk(
    logits: Tensor,
    targets: Tensor,
    softcap: float | None,
    teacher: Tensor | None,
    taught: Tensor | None,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses fp32 [positions], divergences fp32 [positions], and the gradient of the sum of the losses with respect to
    the logits, [positions, vocabulary] in their dtype. Arguments as for `token_losses` and `Lesson`; logits and teacher
    are what the head gives. Without a teacher the divergences are 0.

    With p = softmax(logits) the gradient is p - onehot(target); of the divergence from a teacher q it is p - q.
    """
    values = capped(logits.float(), softcap)
    said = values.log_softmax(-1)
    supervised = targets != IGNORE_INDEX
    indices = torch.where(supervised, targets, 0)[:, None]
    losses = -said.gather(-1, indices)[:, 0]
    wanted = torch.zeros_like(said).scatter(-1, indices, 1.0)
    divergences = torch.zeros_like(losses)
    if teacher is not None and taught is not None:
        known = capped(teacher.float(), softcap).log_softmax(-1)
        divergences = torch.where(taught, (known.exp() * (known - said)).sum(-1), 0.0)
        share = torch.where(taught, weight, 0.0)
        losses = (1.0 - share) * losses + share * divergences
        wanted = (1.0 - share[:, None]) * wanted + share[:, None] * known.exp()
    gradient = said.exp() - wanted
    if softcap is not None:
        gradient = gradient * (1.0 - (values / softcap).square())
    gradient = torch.where(supervised[:, None], gradient, 0.0).to(logits.dtype)
    return torch.where(supervised, losses, 0.0), torch.where(supervised, divergences, 0.0), gradient


class _LossesOfFrozenHead(torch.autograd.Function):
    """`token_losses` through a head that is not trained: the forward pass makes the gradient of the hidden states, so
    that no logits are kept or computed again.
    """

    @staticmethod
    def forward(ctx, hidden_states, targets, lm_head, softcap, lesson, rows, chunk):
        found = []
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = _head_of(hidden_states[part], targets[part] != IGNORE_INDEX, lm_head)
            of_teacher: tuple = (None, None, 0.0)
            if lesson is not None:
                taught = lesson.taught[part]
                of_teacher = (_head_of(lesson.hidden_states[part], taught, lm_head), taught, lesson.weight)
            losses, divergences, gradient = chunk(logits, targets[part], softcap, *of_teacher)
            found.append((losses, divergences, gradient @ lm_head.weight))
        losses, divergences, gradients = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(gradients)
        ctx.set_materialize_grads(False)  # one for the logits would have their size
        ctx.mark_non_differentiable(divergences, logits)
        return losses, divergences, logits

    @staticmethod
    @once_differentiable
    def backward(ctx, of_losses, *_):
        if of_losses is None:
            return (None,) * 7
        (gradients,) = ctx.saved_tensors
        return (of_losses[:, None] * gradients).to(gradients.dtype), *(None,) * 6


def _head_of(hidden_states: Tensor, used: Tensor, lm_head: nn.Module) -> Tensor:
    """Logits; those of rows that are not used are finite."""
    # Selected, not multiplied: 0 times NaN would still reach the gradients of the head and of what is below.
    return lm_head(torch.where(used[:, None], hidden_states, 0.0))


def _is_frozen_linear(lm_head: nn.Module, dtype: torch.dtype) -> bool:
    """fp16 is left out: its gradient needs the loss scale before it is rounded."""
    frozen = type(lm_head) is nn.Linear and not any(p.requires_grad or p.is_meta for p in lm_head.parameters())
    return frozen and lm_head.weight.dtype == dtype != torch.float16


def token_losses(
    hidden_states: Tensor,
    targets: Tensor,
    lm_head: nn.Linear,
    *,
    softcap: float | None = None,
    lesson: Lesson | None = None,
    chunk: OfChunk = of_chunk,
) -> TokenLosses:
    """Loss of each supervised position.

    hidden_states: [positions, hidden], the LM's last; targets: int64 [positions], -100 at padding, whose hidden states
    may hold anything, NaN included. chunk: `of_chunk`, or the same compiled.
    A token's loss is its cross-entropy; with a teacher, (1 - weight) × cross-entropy + weight × the Kullback-Leibler
    divergence of the model's distribution from the teacher's (Hinton et al., 2015, arXiv 1503.02531, temperature 1).
    """
    rows = max(1, MAX_LOGITS_AT_ONCE // lm_head.weight.shape[0] // (1 if lesson is None else 2))
    learns = torch.is_grad_enabled() and hidden_states.requires_grad
    if len(targets) and learns and _is_frozen_linear(lm_head, hidden_states.dtype):
        given = (hidden_states, targets, lm_head, softcap, lesson, rows, chunk)
        losses, divergences, logits = _LossesOfFrozenHead.apply(*given)
        return TokenLosses(losses, None if lesson is None else divergences, logits)
    return _losses_by_autograd(hidden_states, targets, lm_head, softcap, lesson, rows)


def _losses_by_autograd(
    hidden_states: Tensor, targets: Tensor, lm_head: nn.Linear, softcap: float | None, lesson: Lesson | None, rows: int
) -> TokenLosses:
    """`token_losses` for any head."""
    last_logits = hidden_states.new_empty(0, lm_head.weight.shape[0])

    def chunk_losses(hidden: Tensor, target: Tensor, *of_lesson: Tensor) -> Tensor:
        """[1 or 2, positions]: loss and, with a lesson, divergence."""
        nonlocal last_logits
        last_logits = _head_of(hidden, target != IGNORE_INDEX, lm_head)
        logits, last_logits = capped(last_logits.float(), softcap), last_logits.detach()
        cross_entropy = nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=IGNORE_INDEX)
        if lesson is None:
            return cross_entropy[None]
        taught, teacher = of_lesson
        with torch.no_grad():
            expected = capped(_head_of(teacher, taught, lm_head).float(), softcap).log_softmax(-1)
        said = logits.log_softmax(-1)
        divergence = nn.functional.kl_div(said, expected, reduction="none", log_target=True).sum(-1)
        mixed = (1.0 - lesson.weight) * cross_entropy + lesson.weight * divergence
        return torch.stack([torch.where(taught, mixed, cross_entropy), torch.where(taught, divergence, 0.0)])

    parts = [hidden_states.split(rows), targets.split(rows)]
    if lesson is not None:
        parts += [lesson.taught.split(rows), lesson.hidden_states.split(rows)]
    if hidden_states.shape[0] <= rows:
        found = chunk_losses(*(part[0] for part in parts))
    else:
        # The backward pass computes each chunk's logits again, so that they need not be kept.
        chunks = zip(*parts, strict=True)
        again = [checkpoint(chunk_losses, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        found = torch.cat(again, dim=1)
    return TokenLosses(found[0], None if lesson is None else found[1].detach(), last_logits)


def supervised_loss(
    hidden_states: Tensor,
    labels: Tensor,
    lm_head: nn.Linear,
    *,
    shift_labels: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of token losses over supervised positions / `num_items_in_batch`.

    hidden_states: [batch, tokens, hidden], the LM's last; labels: [batch, tokens], unshifted, -100 = not supervised.
    shift_labels: [batch, tokens], of each position the next token, in place of `labels`, for a part of a longer row.
    num_items_in_batch: supervised tokens of the whole global step; None: those given here.
    Returns (loss, fp32 scalar; detached logits [positions, vocabulary] of the last chunk). Without any supervised token
    the loss is 0 with a zero gradient: the caller sees the count and decides. Waits for the device.
    """
    if shift_labels is None:
        hidden_states, shift_labels = hidden_states[:, :-1], labels[:, 1:]
    supervised = shift_labels != IGNORE_INDEX
    targets = shift_labels[supervised]
    found = token_losses(hidden_states[supervised], targets, lm_head, softcap=softcap)
    count = num_items_in_batch if num_items_in_batch is not None else max(1, targets.shape[0])
    return found.losses.sum() / count, capped(found.last_logits.float(), softcap)


@torch.no_grad()
def reference_loss(
    hidden_states: Tensor,
    labels: Tensor,
    lm_head: nn.Module,
    *,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    lesson: Lesson | None = None,
) -> tuple[Tensor, Tensor]:
    """The same loss the plain way: fp32 logits of every position, log-softmax, one look-up a token (`--manual_loss`).

    Arguments as for `supervised_loss`; a lesson for the supervised positions in their order. Waits for the device.
    Returns (loss, logits [batch, tokens, vocabulary]).
    """
    logits = head_logits(hidden_states, lm_head, softcap)
    log_probabilities = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    supervised = targets != IGNORE_INDEX
    if lesson is None:
        total = -picked.masked_fill(~supervised, 0.0).sum()
    else:
        taught = lesson.taught
        expected = head_logits(lesson.hidden_states[taught], lm_head, softcap).log_softmax(-1)
        said, known = log_probabilities[supervised][taught], picked[supervised]
        divergence = (expected.exp() * (expected - said)).sum()
        weights = torch.where(taught, 1.0 - lesson.weight, 1.0)
        total = lesson.weight * divergence - (weights * known).sum()
    count = num_items_in_batch if num_items_in_batch is not None else max(1, int(supervised.sum()))
    return total / count, logits
