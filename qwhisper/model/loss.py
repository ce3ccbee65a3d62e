"""Cross-entropy of each supervised position, in chunks, with or without a teacher; and a plain reference of it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS_AT_ONCE = 2**26  # 64 Mi values, 256 MiB in fp32: about 440 positions of Qwen3's vocabulary
IGNORE_INDEX = -100


def head_logits(hidden_states: Tensor, lm_head: nn.Module, softcap: float | None) -> Tensor:
    """fp32 logits [positions, vocabulary]; `softcap` is Gemma 2's final_logit_softcapping."""
    logits = lm_head(hidden_states).float()
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


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
    where there is none; None without a lesson. last_logits: detached logits [positions, vocabulary] of the last chunk.
    """

    losses: Tensor
    divergences: Tensor | None
    last_logits: Tensor


def token_losses(
    hidden_states: Tensor,
    targets: Tensor,
    lm_head: nn.Linear,
    *,
    softcap: float | None = None,
    lesson: Lesson | None = None,
) -> TokenLosses:
    """Loss of each supervised position.

    hidden_states: [positions, hidden], the LM's last; targets: int64 [positions], -100 at padding, whose hidden states
    may hold anything, NaN included.
    A token's loss is its cross-entropy; with a teacher, (1 - weight) × cross-entropy + weight × the Kullback-Leibler
    divergence of the model's distribution from the teacher's (Hinton et al., 2015, arXiv 1503.02531, temperature 1).
    """
    rows = max(1, MAX_LOGITS_AT_ONCE // lm_head.weight.shape[0] // (1 if lesson is None else 2))
    last_logits = hidden_states.new_empty(0, lm_head.weight.shape[0])

    def chunk_losses(hidden: Tensor, target: Tensor, *of_lesson: Tensor) -> Tensor:
        """[1 or 2, positions]: loss and, with a lesson, divergence."""
        nonlocal last_logits
        # Selected, not multiplied: 0 times NaN would still reach the gradients of the head and of what is below.
        hidden = torch.where((target != IGNORE_INDEX)[:, None], hidden, 0.0)
        logits = head_logits(hidden, lm_head, softcap)
        last_logits = logits.detach()
        cross_entropy = nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=IGNORE_INDEX)
        if lesson is None:
            return cross_entropy[None]
        taught, teacher = of_lesson
        with torch.no_grad():
            teacher = torch.where(taught[:, None], teacher, 0.0)
            expected = head_logits(teacher, lm_head, softcap).log_softmax(-1)
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
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    shift_labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of token losses over supervised positions / `num_items_in_batch`.

    hidden_states: [batch, tokens, hidden], the LM's last; labels: [batch, tokens], unshifted, -100 = not supervised.
    shift_labels: [batch, tokens], each the token to predict there; taken instead of `labels` if given.
    num_items_in_batch: supervised tokens of the whole global step; None: those given here.
    Returns (loss, fp32 scalar; detached logits [positions, vocabulary] of the last chunk). Without any supervised token
    the loss is 0 with a zero gradient: the caller sees the count and decides. Waits for the device.
    """
    if shift_labels is None:
        hidden_states, targets = hidden_states[:, :-1], labels[:, 1:]
    else:
        targets = shift_labels
    supervised = targets != IGNORE_INDEX
    hidden_states, targets = hidden_states[supervised], targets[supervised]
    found = token_losses(hidden_states, targets, lm_head, softcap=softcap)
    count = num_items_in_batch if num_items_in_batch is not None else max(1, targets.shape[0])
    return found.losses.sum() / count, found.last_logits


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
