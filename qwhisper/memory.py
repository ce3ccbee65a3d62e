"""Memory that runs out, however it is reported."""

import errno
import re

import torch

# Of PyTorch's RuntimeErrors: the host's allocator, pinned memory, CUDA's libraries, C++, and sizes beyond any address.
SAID = re.compile(
    r"DefaultCPUAllocator: |out of memory|ALLOC_FAILED|std::bad_alloc|Storage size calculation overflowed"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the device's or the host's: for the latter PyTorch has no exception type."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and bool(SAID.search(str(error))))


def is_of_the_machine(error: BaseException) -> bool:
    """Whether memory or the accelerator failed, which says nothing about the file that was being loaded."""
    return is_out_of_memory(error) or isinstance(error, torch.AcceleratorError)
