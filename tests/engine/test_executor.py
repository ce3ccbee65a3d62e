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
    forward = run.executor.model.forward

    def with_little_memory(input_ids, **kwargs):
        if input_ids.shape[1] > tokens // 2:
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(run.executor.model, "forward", with_little_memory)
    run.executor.model.zero_grad(set_to_none=True)
    run.executor.max_tokens_per_pack = 10_000
    loss, halvings = run.executor.forward_backward(samples[:4], sum(s.num_supervised for s in samples[:4]))
    assert [h.now for h in halvings] == [tokens // 2]
    assert_same(expected, (float(loss), gradients(run)))


def test_one_sample_that_does_not_fit_ends_the_run_with_advice(run, monkeypatch):
    run, samples = run

    def no_memory(**kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory (planted)")

    monkeypatch.setattr(run.executor.model, "forward", no_memory)
    with pytest.raises(MemoryLimitError, match="--max_length"):
        run.executor.forward_backward(samples[:2], 10)


def test_manual_loss_agrees_with_the_default_loss(run):
    run, samples = run
    default = loss_and_gradients(run, samples[:4], max_tokens=10_000)
    run.executor.model.manual_loss = True
    assert_same(default, loss_and_gradients(run, samples[:4], max_tokens=10_000))
    model = run.executor.model
    assert float(model.last_manual_loss) == pytest.approx(default[0], rel=TOLERANCE)
    assert model.last_logits.shape[:2] == (1, sum(len(s.input_ids) for s in samples[:4]))


@pytest.mark.parametrize("fault", ["loss", "mask"])
def test_manual_loss_stops_loudly_where_the_two_part(run, monkeypatch, fault):
    run, samples = run
    model = run.executor.model
    model.manual_loss = True
    honest = model.loss_of

    def wrong(hidden_states, labels, *rest):
        if fault == "mask":
            labels = labels.clone()
            labels[0, int((labels[0] != -100).nonzero()[0])] = -100
        loss = honest(hidden_states, labels, *rest)
        return loss * 1.01 if fault == "loss" else loss

    monkeypatch.setattr(model, "loss_of", wrong)
    with pytest.raises(NumericalError, match="--manual_loss"):
        loss_and_gradients(run, samples[:3], max_tokens=10_000)


def test_manual_loss_leaves_a_loss_that_is_nan_both_ways_to_the_finite_check(run):
    run, samples = run
    run.executor.model.manual_loss = True
    with torch.no_grad():
        run.executor.model.model.language_model.norm.weight[0] = float("nan")
    loss, _ = run.executor.forward_backward(samples[:2], sum(s.num_supervised for s in samples[:2]))
    assert loss.isnan()


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
    loss, _ = run.executor.forward_backward(text, sum(sample.num_supervised for sample in text))
    assert float(loss) > 0 and gradients(run) == {}


def test_a_trained_encoder_does_not_hide_that_the_language_model_is_in_fp16(arguments):
    run, _ = make_run(arguments(dtype="fp16", freeze_whisper=False))
    assert run.executor.half_precision
