"""Any packing of a step's samples gives the same loss and gradients; memory running out changes how, not what."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwhisper.errors import MemoryLimitError, NumericalError
from tests.train.helpers import TOLERANCE, assert_same, gradients, loss_and_gradients, make_run


@pytest.fixture
def run(arguments):
    # "auto" is bf16 on a GPU, whose roundings depend on the pack's shape and hide what is compared here.
    run, samples = make_run(arguments(lora_init_scale=1.0, dtype="fp32"))
    with torch.no_grad():  # B is zero at first, and A's gradient with it
        for name, parameter in run.executor.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return run, samples


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(max_tokens=st.integers(1, 400), order=st.permutations(range(5)))
def test_any_packing_in_any_order_gives_the_same_loss_and_gradients(run, max_tokens, order):
    run, samples = run
    whole = loss_and_gradients(run, samples[:5], max_tokens=10_000)
    assert_same(whole, loss_and_gradients(run, [samples[i] for i in order], max_tokens=max_tokens))


def test_packed_equals_padded(run):
    run, samples = run
    packed = loss_and_gradients(run, samples[:6], max_tokens=10_000)
    assert_same(packed, loss_and_gradients(run, samples[:6], max_tokens=10_000, packing=False))


def test_accumulating_four_single_samples_equals_one_batch_of_four(run):
    run, samples = run
    assert_same(
        loss_and_gradients(run, samples[:4], max_tokens=1), loss_and_gradients(run, samples[:4], max_tokens=10_000)
    )


def test_out_of_memory_halves_the_pack_and_keeps_the_mathematics(run, monkeypatch):
    run, samples = run
    expected = loss_and_gradients(run, samples[:4], max_tokens=10_000)
    tokens = sum(len(s.input_ids) for s in samples[:4])
    run_pack = run.executor.run_pack

    def with_little_memory(batch):
        if batch.shape.tokens > tokens // 2:
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return run_pack(batch)

    monkeypatch.setattr(run.executor, "run_pack", with_little_memory)
    run.executor.model.zero_grad(set_to_none=True)
    run.executor.max_tokens_per_pack = 10_000
    step = run.executor.forward_backward(samples[:4], sum(s.num_supervised for s in samples[:4]))
    assert [h.now for h in step.halvings] == [tokens // 2]
    assert_same(expected, (float(step.loss), gradients(run)))


def test_one_sample_that_does_not_fit_ends_the_run_with_advice(run, monkeypatch):
    run, samples = run

    def no_memory(batch):
        raise torch.OutOfMemoryError("CUDA out of memory (planted)")

    monkeypatch.setattr(run.executor, "run_pack", no_memory)
    with pytest.raises(MemoryLimitError, match="--max_length"):
        run.executor.forward_backward(samples[:2], 10)


def test_manual_loss_agrees_with_the_default_loss(run):
    run, samples = run
    default = loss_and_gradients(run, samples[:4], max_tokens=10_000)
    run.executor.manual_loss = True
    assert_same(default, loss_and_gradients(run, samples[:4], max_tokens=10_000))
    assert_same(default, loss_and_gradients(run, samples[:4], max_tokens=10_000, packing=False))


def test_logits_are_kept_while_somebody_asks_for_them(run):
    run, samples = run
    model, tokens = run.executor.model, sum(len(s.input_ids) for s in samples[:4])
    loss_and_gradients(run, samples[:4], max_tokens=10_000)
    assert model.last_logits is None
    model.keep_last_logits = True
    loss_and_gradients(run, samples[:4], max_tokens=10_000)
    assert model.last_logits.shape[0] == sum(s.num_supervised for s in samples[:4])
    run.executor.manual_loss = True
    loss_and_gradients(run, samples[:4], max_tokens=10_000)
    assert model.last_logits.shape[:2] == (1, tokens) and not model.last_logits.requires_grad


def a_wrong_loss(text, tokens):
    return text, dataclasses.replace(tokens, losses=tokens.losses * 1.01)


def a_lost_label(text, tokens):
    targets = text.targets.clone()
    targets[0] = -100
    return dataclasses.replace(text, targets=targets), tokens


def a_shifted_position(text, tokens):
    return dataclasses.replace(text, positions=text.positions - 1), tokens


@pytest.mark.parametrize(
    ("fault", "packing"),
    [
        (a_wrong_loss, True),
        (a_lost_label, False),
        (a_shifted_position, True),
        pytest.param(a_wrong_loss, False, marks=pytest.mark.slow),
        pytest.param(a_lost_label, True, marks=pytest.mark.slow),
        pytest.param(a_shifted_position, False, marks=pytest.mark.slow),
    ],
)
def test_manual_loss_stops_loudly_where_the_two_part(run, monkeypatch, fault, packing):
    run, samples = run
    batch_of, run_pack = run.executor.batch, run.executor.run_pack

    def wrong_batch(samples):
        batch = batch_of(samples)
        return dataclasses.replace(batch, text=fault(batch.text, None)[0]) if fault != a_wrong_loss else batch

    def wrong_result(batch):
        result = run_pack(batch)
        return dataclasses.replace(result, tokens=fault(batch.text, result.tokens)[1])

    monkeypatch.setattr(run.executor, "batch", wrong_batch)
    monkeypatch.setattr(run.executor, "run_pack", wrong_result)
    loss_and_gradients(run, samples[:3], max_tokens=10_000, packing=packing)
    run.executor.manual_loss = True
    with pytest.raises(NumericalError, match="--manual_loss"):
        loss_and_gradients(run, samples[:3], max_tokens=10_000, packing=packing)


def test_manual_loss_leaves_a_loss_that_is_nan_both_ways_to_the_finite_check(run):
    run, samples = run
    run.executor.manual_loss = True
    with torch.no_grad():
        run.executor.model.model.language_model.norm.weight[0] = float("nan")
    step = run.executor.forward_backward(samples[:2], sum(s.num_supervised for s in samples[:2]))
    assert step.loss.isnan()


def test_evaluation_weighs_by_tokens_whatever_the_packs(run):
    run, samples = run
    run.executor.max_tokens_per_pack = 10_000
    whole = run.executor.evaluate(samples)
    run.executor.max_tokens_per_pack = 1
    assert run.executor.evaluate(samples) == pytest.approx(whole, rel=TOLERANCE)
    assert run.executor.model.training


def test_in_fp16_a_step_may_have_no_gradient_at_all(arguments):
    """Text alone, and a projector that nothing passes through."""
    run, samples = make_run(arguments(dtype="fp16", use_lora=False, freeze_projector_steps=0))
    text = [dataclasses.replace(s, input_ids=s.input_ids[-6:], labels=s.labels[-6:], windows=[]) for s in samples[:2]]
    assert all(run.executor.model.config.audio_token_id not in sample.input_ids for sample in text)
    run.executor.loss_scale = 1024.0
    step = run.executor.forward_backward(text, sum(sample.num_supervised for sample in text))
    assert float(step.loss) > 0 and gradients(run) == {}


def test_a_trained_encoder_does_not_hide_that_the_language_model_is_in_fp16(arguments):
    run, _ = make_run(arguments(dtype="fp16", freeze_whisper=False))
    assert run.executor.half_precision
