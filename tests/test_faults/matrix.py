"""How a fault test is written: once, and run twice.

With the guard on, the guarantee must hold. With the guard patched out, the same test must fail on the guarantee's own
assertion (a strict expected failure): a guarantee that holds without its guard proves nothing about it. `make test`
runs it with the guard alone, `make test-all` with and without.
docs/reliability.md is made of what is declared here.
"""

from collections.abc import Callable

import pytest

CLASSES = ("numerical", "data", "process", "disk", "memory", "logger")
WithoutGuard = Callable[[pytest.MonkeyPatch], None]


def fault(
    name: str,
    *,
    of: str,
    guarantee: str,
    without: WithoutGuard,
    slow: bool = False,
):
    """Marks a test of one fault.

    name: the fault, as a user would say it. of: one of CLASSES. guarantee: what the user may rely on. without: patches
    the guard out. slow: only `make test-all` runs it.
    """
    assert of in CLASSES, of

    def decorate(test):
        off = pytest.param("off", marks=[pytest.mark.xfail(strict=True, raises=AssertionError), pytest.mark.slow])
        test = pytest.mark.parametrize("guard", ["on", off], indirect=True)(test)
        test = pytest.mark.fault(name=name, of=of, guarantee=guarantee, without=without)(test)
        return pytest.mark.slow(test) if slow else test

    return decorate
