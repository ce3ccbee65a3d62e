"""Cross-entropy over supervised positions alone, in chunks; and the plain computation that it is checked against."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS_AT_ONCE = 2**26  # 64 Mi values, 256 MiB in fp32: about 440 positions of Qwen3's vocabulary
IGNORE_INDEX = -100


def head_logits(hidden_states: Tensor, lm_head: nn.Module, softcap: float | None) -> Tensor:
    """fp32 logits [positions, vocabulary]; `softcap` is Gemma 2's final_logit_softcapping."""
    logits = lm_head(hidden_states).float()
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def supervised_loss(
    hidden_states: Tensor,
    labels: Tensor,
    lm_head: nn.Linear,
    *,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of token cross-entropies over supervised positions / `num_items_in_batch`.

    hidden_states: [batch, tokens, hidden], the LM's last; labels: [batch, tokens], unshifted, -100 = not supervised.
    num_items_in_batch: supervised tokens of the whole global step; None: those given here.
    Returns (loss, fp32 scalar; detached logits [positions, vocabulary] of the last chunk). Without any supervised token
    the loss is
    0 with a zero gradient: the caller sees the count and decides.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    hidden_states, targets = hidden_states[:, :-1][supervised], targets[supervised]
    rows = max(1, MAX_LOGITS_AT_ONCE // lm_head.weight.shape[0])
    last_logits = hidden_states.new_empty(0, lm_head.weight.shape[0])

    def chunk_loss(hidden: Tensor, target: Tensor) -> Tensor:
        nonlocal last_logits
        logits = head_logits(hidden, lm_head, softcap)
        last_logits = logits.detach()
        return nn.functional.cross_entropy(logits, target, reduction="sum")

    if hidden_states.shape[0] <= rows:
        total = chunk_loss(hidden_states, targets)
    else:
        # Each chunk's logits are computed once more in the backward pass instead of being kept.
        chunks = zip(hidden_states.split(rows), targets.split(rows), strict=True)
        total = torch.stack(
            [checkpoint(chunk_loss, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in chunks]
        ).sum()
    count = num_items_in_batch if num_items_in_batch is not None else max(1, targets.shape[0])
    return total / count, last_logits


@torch.no_grad()
def reference_loss(
    hidden_states: Tensor,
    labels: Tensor,
    lm_head: nn.Module,
    *,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same number the plain way: fp32 logits of every position, log-softmax, one look-up a token (`--manual_loss`).

    Arguments as for `supervised_loss`. Returns (loss, logits [batch, tokens, vocabulary]).
    """
    logits = head_logits(hidden_states, lm_head, softcap)
    log_probabilities = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    supervised = targets != IGNORE_INDEX
    total = -picked.masked_fill(~supervised, 0.0).sum()
    count = num_items_in_batch if num_items_in_batch is not None else max(1, int(supervised.sum()))
    return total / count, logits
