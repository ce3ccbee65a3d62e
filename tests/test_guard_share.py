"""benchmarks/guard_share.py: which steps are bare, and what the share follows from."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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


def test_a_bare_step_encodes_what_the_feature_cache_lacks_before_its_pass(guard_share, monkeypatch):
    """Two weights, gradient (3, 4): bounded to a norm of 1, a step at a learning rate of 0.5."""
    weight, called = torch.nn.Parameter(torch.zeros(2)), []
    optimizer = torch.optim.SGD([weight], lr=0.5)

    def forward_backward(samples, tokens):
        called.append(("pass", samples, tokens))
        weight.grad = torch.tensor([3.0, 4.0])
        return SimpleNamespace(loss=torch.tensor(2.5))

    session = SimpleNamespace(
        features=SimpleNamespace(complete=lambda samples: called.append(("complete", samples)) or []),
        executor=SimpleNamespace(forward_backward=forward_backward),
        groups={"lora": [weight]},
        args=SimpleNamespace(max_grad_norm=1.0),
        optimizer=optimizer,
        scheduler=SimpleNamespace(step=lambda: None),
        state=SimpleNamespace(step=0, position=None, supervised_tokens=0),
    )
    samples = [SimpleNamespace(num_supervised=3), SimpleNamespace(num_supervised=4)]
    report = guard_share.bare_step(session, SimpleNamespace(samples=samples, position=8))
    assert called == [("complete", samples), ("pass", samples, 7)]
    assert (report.loss, report.tokens, session.state.supervised_tokens) == (2.5, 7, 7)
    assert torch.allclose(weight, torch.tensor([-0.3, -0.4]), atol=1e-5)


def test_the_clips_are_those_of_the_case(guard_share, monkeypatch, tmp_path):
    """Length and number of turns as in throughput.py, for all steps or at most MOST_CLIPS."""
    made, argv = {}, ["guard_share.py", "--tokenizer", "none", "--output_dir", str(tmp_path), "--case", "0.6b-turns"]

    class Made(Exception):
        pass

    def make_data(folder, count, **lengths):
        made.update(lengths, count=count)
        raise Made

    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(guard_share, "make_bases", lambda *args, **kwargs: None)
    monkeypatch.setattr(guard_share, "make_data", make_data)
    with pytest.raises(Made):
        guard_share.main()
    assert made == {"count": guard_share.MOST_CLIPS, "longest_s": 60.0, "most_turns": 4}
