"""Trackers' callbacks: what they do wrong is theirs."""

import sys

import pytest
from transformers import TrainerCallback

from qwhisper.train import hooks
from tests.test_faults.inject import outcome_of


def tracker_that(act) -> type[TrainerCallback]:
    return type("Leaves", (TrainerCallback,), {"on_log": lambda self, *shown, **values: act()})


def leave():
    sys.exit("login needed")


def interrupt():
    raise KeyboardInterrupt


def test_a_tracker_that_exits_is_named_and_left_out(arguments, monkeypatch, capsys):
    monkeypatch.setattr(hooks, "get_reporting_integration_callbacks", lambda names: [tracker_that(leave)])
    assert outcome_of(arguments(report_to=["broken"])).code == 0
    assert capsys.readouterr().err.count("Leaves failed in on_log (SystemExit: login needed)") == 1


def test_ctrl_c_in_a_tracker_is_not_the_trackers():
    with pytest.raises(KeyboardInterrupt):
        hooks.Tracker(tracker_that(interrupt)()).on_log()
