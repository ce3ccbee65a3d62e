"""The listening probe: what it measures, which pairs it measures on, how seldom, and that it leaves no trace."""

import itertools
import json
import math
import os
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from qwhisper.data import dialogue_audio, loader
from qwhisper.data.dialogue import AudioClip, Dialogue, Message, read_dialogues
from qwhisper.data.loader import StepSamples
from qwhisper.data.rows import IGNORE
from qwhisper.evaluate import turns
from qwhisper.frames import SAMPLE_RATE
from qwhisper.model.processor import encoder_of
from qwhisper.train.loop import train_step
from qwhisper.train.probe import (
    MAX_PAIRS,
    MIN_PAIRS,
    TIME_SHARE,
    ListeningProbe,
    Pair,
    ProbeState,
    choose_pairs,
    first_probe_step,
    first_questions_step,
    listening_gain,
    make_probe,
)
from tests.small import write_dialogues
from tests.test_faults.inject import both_memories
from tests.train.helpers import make_run, same_bits, trainable
from tests.train.listeners import listening_arguments, train_and_probe
from tests.workers import CrashingReader


def probe_of(run, dialogues, **values) -> ListeningProbe | None:
    values = {"state": ProbeState(), "first_step": 1, "seed": 0} | values
    return make_probe(run.executor, run.encoder, dialogues, **values)


@pytest.fixture
def dialogues(train_file):
    return read_dialogues(train_file)


@pytest.fixture(scope="module")
def listeners(tmp_path_factory):
    return listening_arguments(tmp_path_factory.mktemp("listeners"))


def test_who_learned_from_the_audio_gains_from_it_far_above_the_noise(listeners, tmp_path):
    result = train_and_probe(replace(listeners, output_dir=str(tmp_path / "run"))).measure()
    assert result.pairs == MAX_PAIRS
    assert result.gain > 0.5  # the least of 6 seeds is 0.8 nats
    assert result.gain > 10 * result.noise


def test_gain_weighs_by_tokens_and_noise_is_the_standard_error_of_repeated_draws():
    known = listening_gain([1.0, 2.0], [3.0, 3.0], [1, 4])
    # (2 + 1) / 5, and residuals 2 - 0.6 and 1 - 2.4: sqrt(2 * (1.4**2 + 1.4**2)) / 5
    assert known.gain == pytest.approx(0.6) and known.noise == pytest.approx(2.8 / 5)
    assert listening_gain([1.0, 2.0], [1.0, 2.0], [1, 4]) == replace(known, gain=0.0, noise=0.0)
    draw = np.random.default_rng(0)
    results = []
    for _ in range(400):
        tokens = draw.integers(2, 20, 16)
        gains = 0.3 * tokens + draw.normal(0, np.sqrt(tokens))
        results.append(listening_gain([0.0] * 16, gains.tolist(), tokens.tolist()))
    spread = float(np.std([result.gain for result in results]))
    assert np.mean([result.gain for result in results]) == pytest.approx(0.3, abs=4 * spread / 20)
    # The spread of 400 draws is itself known to 3.5 %; the estimate from 16 pairs is low by a few percent.
    assert np.mean([result.noise for result in results]) == pytest.approx(spread, rel=0.15)


def test_samples_losses_are_those_of_evaluation_one_by_one_in_any_pack(arguments):
    run, samples = make_run(arguments(dtype="fp32"))
    samples = samples[:6]
    alone = [run.executor.evaluate([sample]) * sample.num_supervised for sample in samples]
    assert run.executor.sample_losses([]) == []
    for limit, packing in ((4096, True), (100, True), (1, True), (100, False)):
        run.executor.max_tokens_per_pack, run.executor.packing = limit, packing
        # fp32 sums of a few hundred terms in another order: 1e-5
        assert run.executor.sample_losses(samples) == pytest.approx(alone, rel=1e-5)
        assert run.executor.sample_losses(samples[::-1]) == pytest.approx(alone[::-1], rel=1e-5)
    assert run.executor.model.training and not any(p.grad is not None for p in run.executor.model.parameters())


def steps(args, *, probed: bool):
    run, samples = make_run(args)
    probe = probe_of(run, read_dialogues(args.train_file)) if probed else None
    losses = []
    for n in range(args.max_steps):
        if probe is not None:
            assert probe.measure() is not None
        losses.append(train_step(run, StepSamples(samples[2 * n : 2 * n + 2], [])).loss)
    return run, losses


def test_training_with_the_probe_is_bit_identical_to_training_without(arguments, tmp_path):
    dropout = {"lora_dropout": 0.1, "projector_dropout": 0.2, "freeze_projector_steps": 1, "max_steps": 3}
    run, losses = steps(arguments(output_dir=str(tmp_path / "without"), **dropout), probed=False)
    expected, generator = trainable(run), torch.get_rng_state()
    probed, probed_losses = steps(arguments(output_dir=str(tmp_path / "with"), **dropout), probed=True)
    assert probed_losses == losses and same_bits(expected, trainable(probed)) == []
    assert torch.equal(torch.get_rng_state(), generator)
    for moments, others in zip(run.optimizer.state.values(), probed.optimizer.state.values(), strict=True):
        assert all(torch.equal(moments[name], others[name]) for name in moments)
    assert [m.training for m in run.executor.model.modules()] == [m.training for m in probed.executor.model.modules()]
    assert all(p.grad is None for p in probed.executor.model.parameters())
    assert vars(probed.executor).keys() == vars(run.executor).keys()
    assert probed.executor.max_tokens_per_pack == run.executor.max_tokens_per_pack


def test_pairs_differ_in_audio_alone_and_come_from_as_many_dialogues_as_there_are(arguments, dialogues):
    run, _ = make_run(arguments())
    pairs = choose_pairs(dialogues, run.encoder, seed=0)
    spoken = [c for c in dialogues if c.clips]
    assert len(pairs) >= len(spoken) >= MIN_PAIRS
    assert {pair.true.id for pair in pairs[: len(spoken)]} == {c.id for c in spoken}
    audio = run.executor.model.config.audio_token_id
    for pair in pairs:
        first, second = pair.true, pair.swapped
        assert [i for i in first.input_ids if i != audio] == [i for i in second.input_ids if i != audio]
        assert first.num_supervised == second.num_supervised > 0
        assert first.labels[first.labels != IGNORE].tolist() == second.labels[second.labels != IGNORE].tolist()
        assert len(first.windows) == len(second.windows) > 0
        assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first.windows, second.windows, strict=True))


def test_pairs_are_at_most_so_many_and_the_same_for_the_same_seed(arguments, tmp_path):
    many = read_dialogues(write_dialogues(tmp_path / "many", 60))
    run, _ = make_run(arguments())
    first, again, other = (choose_pairs(many, run.encoder, seed=seed) for seed in (0, 0, 1))
    ids = [[pair.true.id for pair in pairs] for pairs in (first, again, other)]
    assert len(first) == MAX_PAIRS == len(set(ids[0])) and ids[0] == ids[1] != ids[2]


def test_a_dialogue_that_kills_the_worker_is_in_no_pair(arguments, tmp_path, monkeypatch):
    values = {"train_file": str(write_dialogues(tmp_path / "many", 24)), "max_steps": 10_000}

    def pairs(num_workers: int, name: str) -> list[Pair]:
        args = arguments(dataloader_num_workers=num_workers, output_dir=str(tmp_path / name), **values)
        return make_run(args)[0].probe.pairs

    killer = pairs(0, "here")[0].true.id
    monkeypatch.setattr(loader, "DialogueReader", partial(CrashingReader, ids=frozenset({killer}), trainer=os.getpid()))
    ids = [pair.true.id for pair in pairs(1, "killed")]
    assert killer not in ids and len(ids) == MAX_PAIRS


def test_text_only_and_very_few_dialogues_give_no_probe(arguments, dialogues):
    run, _ = make_run(arguments())
    text = [
        Dialogue(f"t{n}", (Message("user", ("Hello",)), Message("assistant", (f"hi {n}",))), "file") for n in range(20)
    ]
    assert probe_of(run, text) is None and probe_of(run, []) is None
    assert probe_of(run, [c for c in dialogues if c.clips][:2]) is None
    assert probe_of(run, [*text, *dialogues]) is not None


def test_bad_clips_and_cut_dialogues_are_no_pairs(arguments, dialogues, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    bad = [
        Dialogue(
            f"bad{n}",
            (
                Message("user", (AudioClip(str(tmp_path / "silent.wav")), "Pitch?")),
                Message("assistant", (f"none {n}",)),
            ),
            "file",
        )
        for n in range(3)
    ]
    run, _ = make_run(arguments())
    good = choose_pairs([*bad, *dialogues], run.encoder, seed=0)
    assert good and not any("bad" in pair.true.id for pair in good)
    good = choose_pairs(dialogues, run.encoder, seed=0)
    # The line feed behind an answer may go without a word.
    lengths = [(pair.true.id, max(len(pair.true.input_ids), len(pair.swapped.input_ids)) - 1) for pair in good]
    limit = max(length for _, length in lengths) - 1
    short = encoder_of(run.hooks.shown["processing_class"], max_length=limit)
    kept = [pair.true.id for pair in choose_pairs(dialogues, short, seed=0)]
    assert 0 < len(kept) < len(good)
    assert kept == [name for name, length in lengths if length <= limit]


@pytest.fixture
def probe_that_takes(monkeypatch):
    """A function (seconds, state) that makes a probe whose clock says that it took so long, with nothing to measure."""

    def make(seconds: float, state: ProbeState, first_step: int) -> ListeningProbe:
        clock = itertools.count(step=seconds)
        monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
        nothing = SimpleNamespace(sample_losses=lambda samples: [], shift_from_base=lambda samples: 0.0)
        return ListeningProbe(nothing, nothing, [], state, first_step=first_step)

    return make


@pytest.mark.parametrize("seconds", [0.25, 4.0, 16.0])
def test_probing_takes_its_share_of_the_time_and_no_more(seconds, probe_that_takes):
    state = ProbeState()
    probe = probe_that_takes(seconds, state, 800)
    probed = []
    for step in range(1, 20_001):
        if probe.due(step, 1.0 + 0.5 * (step % 5 == 0)):
            probed.append(step)
            assert probe.measure() is None
        # The first one, whose length nobody knew, may be on credit.
        assert len(probed) <= 1 or state.probed <= TIME_SHARE * state.trained
    assert probed[0] == 800
    gaps = np.diff(probed)
    assert gaps.min() * 1.1 >= seconds / TIME_SHARE - 1.5 and state.probed == seconds * len(probed)
    assert state.probed > 0.8 * TIME_SHARE * state.trained


def test_a_resumed_run_probes_at_the_same_steps(probe_that_takes):
    def probed(cut: int | None) -> list[int]:
        probe, found = probe_that_takes(1.25, ProbeState(), 30), []
        for step in range(1, 3_000):
            if step == cut:
                probe = probe_that_takes(1.25, ProbeState(**json.loads(json.dumps(asdict(probe.state)))), 30)
            if probe.due(step, 0.5):
                found.append(step)
                probe.measure()
        return found

    assert probed(None) == probed(700) == probed(29) and len(probed(None)) == 5


def test_time_of_a_probe_is_measured(arguments, dialogues):
    run, _ = make_run(arguments())
    probe = probe_of(run, dialogues)
    assert probe.measure().tokens == sum(pair.true.num_supervised for pair in probe.pairs)
    first = probe.state.last_probe
    probe.measure()
    assert first > 0 and probe.state.probed == first + probe.state.last_probe


@pytest.mark.parametrize(
    ("samples_per_step", "total_steps", "expected"),
    [
        (4, 10_000, 820),  # 16 passes forward are 4 steps of 4: 0.5 % of 800 steps
        (16, 10_000, 620),
        (16, 300, 320),  # none in so short a run
        (16, 800, 420),
        (64, 10_000, 620),
    ],
)
def test_first_probe_comes_after_the_warm_up_and_when_time_allows(samples_per_step, total_steps, expected):
    step = first_probe_step(total_steps=total_steps, freeze_projector_steps=20, samples_per_step=samples_per_step)
    assert step == expected


def test_questions_come_when_time_allows():
    # 32 passes for the pairs, 64 for the questions heard and 32 for them read, of half a dialogue's time each.
    assert [first_questions_step(samples_per_step=n) for n in (4, 16, 64)] == [3200, 800, 200]


def test_pairs_are_of_trained_kinds_where_there_are_enough(arguments, tmp_path):
    def of_kinds(number: int) -> list[Dialogue]:
        """A dialogue of a trained kind `number` times, all others of another."""
        return [
            replace(c, messages=tuple(replace(m, kind="known" if n < number else "new") for m in c.messages))
            for n, c in enumerate(c for c in many if c.clips)
        ]

    many = read_dialogues(write_dialogues(tmp_path / "many", 60))
    run, _ = make_run(arguments())

    def kinds(dialogues) -> set:
        by_id = {c.id: c.messages[1].kind for c in dialogues}
        pairs = choose_pairs(dialogues, run.encoder, seed=0, trained_kinds=["known"])
        assert len(pairs) == MAX_PAIRS
        return {by_id[pair.true.id] for pair in pairs}

    assert kinds(of_kinds(20)) == {"known"}
    assert kinds(of_kinds(4)) == {"known", "new"}


def test_a_clip_is_decoded_once_for_all_pairs(arguments, tmp_path, monkeypatch):
    """Some dialogues are bad, and there are too few of trained kinds, so pairs are looked for three times."""
    spoken = [c for c in read_dialogues(write_dialogues(tmp_path / "many", 40)) if c.clips]
    dialogues = [
        replace(c, messages=tuple(replace(m, kind="known" if n < 4 else "new") for m in c.messages))
        for n, c in enumerate(spoken)
    ]
    bad = [dialogue.id for dialogue in dialogues[::5]]
    for dialogue in dialogues[::5]:
        soundfile.write(dialogue.clips[0].path, np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    run, _ = make_run(arguments())
    decoded, honest = [], dialogue_audio.load_clip
    monkeypatch.setattr(dialogue_audio, "load_clip", lambda clip, **how: decoded.append(clip) or honest(clip, **how))
    pairs = choose_pairs(dialogues, run.encoder, seed=0, trained_kinds=["known"])
    assert len(pairs) == MAX_PAIRS and not any(pair.true.id in bad for pair in pairs)
    good = [clip for dialogue in dialogues if dialogue.id not in bad for clip in dialogue.clips]
    assert len(set(decoded)) < 2 * MAX_PAIRS < 2 * len(good)
    assert max(Counter(decoded).values()) == 1
    monkeypatch.setattr(turns, "KEPT_SAMPLES", 0)  # what no pair has is forgotten, and decoded again if it is needed
    again = choose_pairs(dialogues, run.encoder, seed=0, trained_kinds=["known"])
    assert [pair.true.input_ids.tolist() for pair in again] == [pair.true.input_ids.tolist() for pair in pairs]


def test_what_is_not_finite_is_no_gain(arguments, dialogues):
    run, _ = make_run(arguments())
    probe = probe_of(run, dialogues)
    with torch.no_grad():
        run.executor.model.model.language_model.norm.weight[0] = math.nan
    assert probe.measure() is None and probe.state.probed > 0


@both_memories
def test_a_probe_that_does_not_fit_into_memory_changes_nothing(arguments, dialogues, monkeypatch, run_out):
    run, samples = make_run(arguments())
    probe, before = probe_of(run, dialogues), run.executor.max_tokens_per_pack

    with monkeypatch.context() as patch:
        patch.setattr(run.executor.model.model, "forward", run_out)
        assert probe.measure() is None
    assert run.executor.max_tokens_per_pack == before and run.executor.model.training
    assert train_step(run, StepSamples(samples[:2], [])).skipped is None
