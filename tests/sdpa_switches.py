"""torch's switches for the backends of scaled_dot_product_attention, as they stand now and during its calls."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

SWITCHES = ("cudnn", "flash", "mem_efficient", "math")


def switches() -> dict[str, bool]:
    return {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in SWITCHES}


@contextmanager
def switches_of_calls() -> Iterator[list[dict[str, bool]]]:
    """A list that grows by `switches()` with every call, made by whichever library."""
    seen: list[dict[str, bool]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **keywords):
        seen.append(switches())
        return plain(*args, **keywords)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        yield seen
