"""Recognises that memory ran out, in all the ways in which it is reported, and says what may help."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwhisper.errors import MemoryLimitError, first_line

# In PyTorch's RuntimeErrors: the host's allocator, pinned memory, CUDA's libraries, C++, and sizes beyond any address.
SAID = re.compile(
    r"DefaultCPUAllocator: |out of memory|ALLOC_FAILED|std::bad_alloc|Storage size calculation overflowed"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device or on the host; for the host PyTorch has no exception type."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and bool(SAID.search(str(error))))


def is_of_the_machine(error: BaseException) -> bool:
    """Whether memory or the accelerator failed: then the file that was being loaded is not the cause."""
    return is_out_of_memory(error) or isinstance(error, torch.AcceleratorError)


@contextmanager
def naming_memory_limit(doing: str, cures: str) -> Iterator[None]:
    """Turn out of memory into MemoryLimitError, with what was being done and what may help."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError(
            f"out of memory {doing}: use {cures}, or end what else is on the card ({first_line(error)})"
        ) from error
