"""The small run that faults are injected into, and the guard that a test runs with or without."""

import pytest


@pytest.fixture(autouse=True)
def guard(request, monkeypatch) -> str:
    """ "on", or "off" after the guard of the test's fault was patched out."""
    state = getattr(request, "param", "on")
    if state == "off":
        request.node.get_closest_marker("fault").kwargs["without"](monkeypatch)
    return state
