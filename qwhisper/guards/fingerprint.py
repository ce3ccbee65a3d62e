"""Checksums of weights, to the last bit: whether frozen ones changed, and whether trained ones moved."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from qwhisper.guards.measure import Groups

WORD_BYTES = 8


def frozen_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter that does not require gradients, and of the scales of 4-bit ones.

    Left out: buffers, since rotary embeddings may rewrite theirs as they go; weights that are offloaded (on `meta` they
    have no bits); 4-bit weights on a CPU, which bitsandbytes lays out anew at their first evaluation.
    """
    for name, parameter in model.named_parameters():
        quant_state = getattr(parameter, "quant_state", None)
        if parameter.requires_grad or parameter.is_meta or (quant_state is not None and parameter.device.type == "cpu"):
            continue
        yield name, parameter
        if quant_state is not None:
            yield f"{name}.absmax", quant_state.absmax


@torch.no_grad()
def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """An exact checksum of each tensor, of any dtype: the sum of its bits as 8-byte integers, modulo 2^64.

    One pass over the memory where each tensor lies, nothing copied, and one wait for all of them. A change within one
    word always shows; several changes cancel by chance alone. What does not show is whole words changing places.
    """
    sums = {name: _sum_of_words(tensor) for name, tensor in tensors}
    if not sums:
        return {}
    device = next((total.device for total in sums.values() if total.device.type != "cpu"), torch.device("cpu"))
    together = torch.stack([total.to(device, non_blocking=True) for total in sums.values()])
    return dict(zip(sums, together.tolist(), strict=True))


def group_checksums(groups: Groups) -> dict[str, int]:
    """One checksum a group: another number as soon as any bit of its weights has changed."""
    sums = fingerprint((f"{name}/{i}", p) for name, parameters in groups.items() for i, p in enumerate(parameters))
    return {name: sum(sums[f"{name}/{i}"] for i in range(len(parameters))) for name, parameters in groups.items()}


def changed(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Names whose checksum differs, or that only one of the two has, in the order of `before`."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _sum_of_words(tensor: Tensor) -> Tensor:
    """int64 scalar. Sums of narrower integers would be copied into int64 first: 1.7 s a GB on a core, not 0.07 s."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % WORD_BYTES:
        flat = flat.clone()
    whole = flat.numel() - flat.numel() % WORD_BYTES
    total = flat[:whole].view(torch.int64).sum()
    if whole == flat.numel():
        return total
    rest = nn.functional.pad(flat[whole:], (0, WORD_BYTES - flat.numel() + whole))
    return total + rest.view(torch.int64)[0]
