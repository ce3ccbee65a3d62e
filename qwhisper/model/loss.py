"""Cross-entropy over supervised positions alone, in chunks, also beside a teacher; and the plain computation that it is
checked against.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS_AT_ONCE = 2**26  # 64 Mi values, 256 MiB in fp32: about 440 positions of Qwen3's vocabulary
IGNORE_INDEX = -100


def head_logits(hidden_states: Tensor, lm_head: nn.Module, softcap: float | None) -> Tensor:
    """fp32 logits [positions, vocabulary]; `softcap` is Gemma 2's final_logit_softcapping."""
    logits = lm_head(hidden_states).float()
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


@dataclass
class Lesson:
    """What a teacher, the same language model reading the words, makes of the supervised positions.

    hidden_states: [taught positions, hidden], its last. taught: bool [supervised positions] on the CPU; the others have
    no teacher. weight: from 0 to 1, of the divergence from the teacher; the rest is cross-entropy's. divergence: set by
    `supervised_loss`, its sum over the taught positions in nats, detached.
    """

    hidden_states: Tensor
    taught: Tensor
    weight: float
    divergence: Tensor | None = None


def supervised_loss(
    hidden_states: Tensor,
    labels: Tensor,
    lm_head: nn.Linear,
    *,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    lesson: Lesson | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of token losses over supervised positions / `num_items_in_batch`.

    hidden_states: [batch, tokens, hidden], the LM's last; labels: [batch, tokens], unshifted, -100 = not supervised.
    num_items_in_batch: supervised tokens of the whole global step; None: those given here.
    A token's loss is its cross-entropy; where it has a teacher, (1 - weight) of it and `weight` of the Kullback-Leibler
    divergence of the model's distribution from the teacher's (Hinton et al., 2015, arXiv 1503.02531, at temperature 1).
    Returns (loss, fp32 scalar; detached logits [positions, vocabulary] of the last chunk), and leaves the divergence in
    the lesson. Without any supervised token the loss is 0 with a zero gradient: the caller sees the count and decides.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    hidden_states, targets = hidden_states[:, :-1][supervised], targets[supervised]
    rows = max(1, MAX_LOGITS_AT_ONCE // lm_head.weight.shape[0] // (1 if lesson is None else 2))
    last_logits = hidden_states.new_empty(0, lm_head.weight.shape[0])

    def chunk_loss(hidden: Tensor, target: Tensor, *of_lesson: Tensor) -> Tensor:
        """[loss, divergence]; of_lesson: which positions are taught, and the teacher's hidden states of these."""
        nonlocal last_logits
        logits = head_logits(hidden, lm_head, softcap)
        last_logits = logits.detach()
        if lesson is None:
            loss = nn.functional.cross_entropy(logits, target, reduction="sum")
            return torch.stack([loss, torch.zeros_like(loss)])
        taught, teacher = of_lesson
        with torch.no_grad():
            expected = head_logits(teacher, lm_head, softcap)
        return taught_loss(logits, target, taught, expected, lesson.weight)

    parts = [hidden_states.split(rows), targets.split(rows)]
    if lesson is not None:
        taught = lesson.taught.split(rows)
        parts += [taught, lesson.hidden_states.split([int(part.sum()) for part in taught])]
    if hidden_states.shape[0] <= rows:
        total = chunk_loss(*(part[0] for part in parts))
    else:
        # Each chunk's logits are computed once more in the backward pass instead of being kept.
        chunks = zip(*parts, strict=True)
        again = [checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        total = torch.stack(again).sum(0)
    count = num_items_in_batch if num_items_in_batch is not None else max(1, targets.shape[0])
    if lesson is not None:
        lesson.divergence = total[1].detach()
    return total[0] / count, last_logits


def taught_loss(logits: Tensor, target: Tensor, taught: Tensor, expected: Tensor, weight: float) -> Tensor:
    """[loss, divergence], summed. logits: fp32 [positions, vocabulary]; taught: bool [positions]; expected: the
    teacher's logits, fp32 [taught positions, vocabulary].
    """
    cross_entropy = partial(nn.functional.cross_entropy, reduction="sum")
    said, meant = logits[taught].log_softmax(-1), expected.log_softmax(-1)
    divergence = nn.functional.kl_div(said, meant, reduction="sum", log_target=True)
    untaught_loss = cross_entropy(logits[~taught], target[~taught])
    loss = untaught_loss + (1.0 - weight) * cross_entropy(logits[taught], target[taught]) + weight * divergence
    return torch.stack([loss, divergence])


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
    """The same number the plain way: fp32 logits of every position, log-softmax, one look-up a token (`--manual_loss`).

    Arguments as for `supervised_loss`. Returns (loss, logits [batch, tokens, vocabulary]).
    """
    logits = head_logits(hidden_states, lm_head, softcap)
    log_probabilities = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    supervised = targets != IGNORE_INDEX
    if lesson is None:
        total = -picked.masked_fill(~supervised, 0.0).sum()
    else:
        expected = head_logits(lesson.hidden_states, lm_head, softcap).log_softmax(-1)
        said, known = log_probabilities[supervised][lesson.taught], picked[supervised]
        divergence = (expected.exp() * (expected - said)).sum()
        weights = torch.where(lesson.taught, 1.0 - lesson.weight, 1.0).to(known.device)
        total = lesson.weight * divergence - (weights * known).sum()
    count = num_items_in_batch if num_items_in_batch is not None else max(1, int(supervised.sum()))
    return total / count, logits
