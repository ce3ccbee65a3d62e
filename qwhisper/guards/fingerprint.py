"""Which weights are frozen, and one checksum for each trained group: did frozen ones change, did trained ones move?"""

from collections.abc import Iterator

from torch import Tensor, nn

from qwhisper.checksums import checksums
from qwhisper.guards.measure import Groups


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


def group_checksums(groups: Groups) -> dict[str, int]:
    """One checksum a group: another number as soon as any bit of its weights has changed."""
    sums = checksums((f"{name}/{i}", p) for name, parameters in groups.items() for i, p in enumerate(parameters))
    return {name: sum(sums[f"{name}/{i}"] for i in range(len(parameters))) for name, parameters in groups.items()}
