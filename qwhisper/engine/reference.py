"""`--manual_loss`: recompute the loss and mask of a pack from its samples' labels, and compare."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwhisper.data.packing import pack_samples, pad_samples
from qwhisper.data.rows import Sample
from qwhisper.engine.batch import Batch
from qwhisper.engine.forward import PackResult
from qwhisper.errors import NumericalError
from qwhisper.model.loss import IGNORE_INDEX, reference_loss
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration


def compare_with_reference(
    model: Qwen3AudioForConditionalGeneration,
    samples: Sequence[Sample],
    batch: Batch,
    result: PackResult,
    loss: Tensor,
    num_supervised: int,
) -> Tensor:
    """Raises NumericalError if loss or mask differ. batch, result: of these samples; loss: sum of its token losses /
    num_supervised. Uses none of the batch's indices except a lesson's. Waits for the device.

    Returns logits of every position, [rows, columns, vocabulary].
    """
    names = ", ".join(sample.id for sample in samples)
    counted = sum(int((sample.labels[1:] != IGNORE_INDEX).sum()) for sample in samples)
    used = int((batch.text.targets != IGNORE_INDEX).sum())
    if counted != used:
        raise NumericalError(f"--manual_loss: {used} positions were supervised, the labels of {names} have {counted}")
    rows = pack_samples(samples) if batch.text.cu_seq_lens is not None else pad_samples(samples, 0)
    labels = rows["labels"]
    assert isinstance(labels, Tensor)
    reference, logits = reference_loss(
        result.hidden_states,
        labels.to(result.hidden_states.device),
        model.lm_head,
        num_items_in_batch=num_supervised,
        softcap=model.softcap,
        lesson=result.lesson,
    )
    fast, plain = float(loss.detach()), float(reference)
    if not math.isfinite(fast) and not math.isfinite(plain):
        return logits  # both are not finite, and the finite check skips the step
    # Both sum the same fp32 terms in different orders; the head's matrix product rounds by shape, in the head's dtype.
    head = model.lm_head.weight
    tolerance = max(1e-5, 4 * torch.finfo(head.dtype).eps if head.is_floating_point() else 0.03)
    if not abs(fast - plain) <= tolerance * max(1.0, abs(plain)):
        raise NumericalError(f"--manual_loss: loss {fast:.6g}, computed the plain way {plain:.6g} (samples {names})")
    return logits
