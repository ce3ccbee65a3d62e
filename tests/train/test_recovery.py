import math

import pytest

from qwhisper.engine.executor import Executor
from qwhisper.train.recovery import drop_bad_samples, num_supervised, run_samples
from tests.test_faults.inject import loss_times, plant
from tests.train.helpers import assert_same, gradients, make_run


@pytest.fixture
def run_and_samples(arguments):
    run, samples = make_run(arguments(freeze_projector_steps=0, dtype="fp32"))
    samples = samples[:6]
    run.executor.max_tokens_per_pack = 2 * max(len(s.input_ids) for s in samples)
    assert [len(pack) for pack in run.executor.packs(samples)] == [3, 3]
    return run, samples


@pytest.fixture
def runs(monkeypatch) -> list[set[str]]:
    """The samples of every forward and backward pass."""
    honest, seen = Executor.run_packs, []

    def noted(self, samples, count):
        seen.append({sample.id for sample in samples})
        return honest(self, samples, count)

    monkeypatch.setattr(Executor, "run_packs", noted)
    return seen


def test_what_is_left_of_a_step_of_several_packs_equals_the_step_without_the_bad_sample(run_and_samples, monkeypatch):
    run, samples = run_and_samples
    rest = [sample for sample in samples if sample is not samples[3]]
    statistics, _ = run_samples(run, rest, num_supervised(rest))
    expected = statistics.loss, gradients(run)
    plant(monkeypatch, loss_times(math.nan), samples={samples[3].id})
    failed, _ = run_samples(run, samples, num_supervised(samples))
    assert failed.not_finite
    kept, statistics = drop_bad_samples(run, samples, failed)
    assert {sample.id for sample in kept} == {sample.id for sample in rest}
    assert_same(expected, (statistics.loss, gradients(run)))


def test_only_a_bad_pack_is_run_again_sample_by_sample(run_and_samples, monkeypatch, runs):
    run, samples = run_and_samples
    packs = [{sample.id for sample in pack} for pack in run.executor.packs(samples)]
    plant(monkeypatch, loss_times(math.nan), samples={samples[3].id})
    failed, _ = run_samples(run, samples, num_supervised(samples))
    drop_bad_samples(run, samples, failed)
    bad = next(pack for pack in packs if samples[3].id in pack)
    assert [ids for ids in runs if len(ids) == 3] == packs
    assert [ids for ids in runs if len(ids) == 1] == [{sample.id} for sample in samples if sample.id in bad]
