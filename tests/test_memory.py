"""Memory that runs out is known by PyTorch's and Python's own errors, which have several types and texts."""

import errno

import pytest
import torch

from qwhisper.errors import MemoryLimitError, first_line
from qwhisper.memory import is_out_of_memory


def error_of(call) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing went wrong")


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.empty(1 << 60),
        lambda: torch.empty(1 << 62),
        lambda: torch.nn.Linear(64, 10**12, bias=False),
        lambda: bytearray(1 << 60),
    ],
)
def test_real_errors_are_known(call):
    error = error_of(call)
    assert is_out_of_memory(error) and first_line(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        # What a failed pinned allocation, a library of CUDA's and C++ say.
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_errors_that_no_test_can_provoke_are_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        error_of(lambda: torch.ones(2) @ torch.ones(3)),
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryLimitError("out of memory with one sample"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_an_error_is_told_in_one_line():
    assert first_line(RuntimeError("one\ntwo")) == "one" and first_line(MemoryError()) == "MemoryError"
