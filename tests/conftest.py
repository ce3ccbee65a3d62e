"""Gives every process that runs tests the fixtures of tests/fixtures.py."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """A process that hands the tests out to others need not spend ten seconds on importing torch."""
    hands_out = config.getoption("numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ
    if not hands_out:
        config.pluginmanager.import_plugin("tests.fixtures")
