"""benchmarks/guard_share.py: which steps are bare, and what the share follows from."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwhisper.train import loop

NAMES = ("guard_share", "throughput", "throughput_meter", "throughput_cases", "real_shapes", "common")


@pytest.fixture
def guard_share(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield importlib.import_module("guard_share")
    for name in NAMES:
        del sys.modules[name]


def test_the_share_follows_from_the_blocks_without_their_checkpoints(guard_share, monkeypatch):
    """A bare step takes 1 s, a full one 1.02 s, a checkpoint 2 s, one of them in a full block."""
    now = [0.0]
    monkeypatch.setattr(guard_share, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    blocks = guard_share.Blocks(warm=2, length=2)
    save, bare = blocks.timed_save(lambda: bool(now.__setitem__(0, now[0] + 2))), []
    for step in range(2 + 2 * 2 * 2 + 1):
        blocks.on_step_begin(None, None, None)
        bare.append(blocks.bare)
        now[0] += 1.0 if blocks.bare else 1.02
        if step == 5:
            save()
    assert bare == [True, False] + 2 * [True, True, False, False] + [True]
    found = guard_share.shares(blocks, save_steps=200)
    assert found["share_steps"] == pytest.approx(0.02) and found["error"] == pytest.approx(0, abs=1e-9)
    assert found["share_saves"] == pytest.approx(2 / 200) and found["share"] == pytest.approx(0.03)


def test_only_a_bare_step_leaves_the_guards_out(guard_share, monkeypatch):
    called = []
    for name in ("train_step", "watch", "log_step", "log_window", "as_before_step"):
        monkeypatch.setattr(loop, name, lambda *args, _name=name, **kwargs: called.append(_name))
    own, blocks = loop.train_step, guard_share.Blocks(warm=0, length=1)
    monkeypatch.setattr(guard_share, "bare_step", lambda session, fetched: called.append("bare_step"))
    with guard_share.in_turns(blocks):
        for blocks.bare in (False, True):
            loop.as_before_step(None)
            loop.train_step(None, None)
            loop.log_step(None, None, {})
            loop.watch(None, None, {}, None, save_is_due=False)
            loop.log_window(None, [], 0.0)
    assert called == ["as_before_step", "train_step", "log_step", "watch", "log_window", "bare_step"]
    assert loop.train_step is own
