"""Recognises that memory ran out, in all the ways in which it is reported."""

import errno
import re

import torch

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
