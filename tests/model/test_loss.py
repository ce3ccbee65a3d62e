import math

import pytest
import torch
from torch import nn

from qwhisper.model import loss as losses
from qwhisper.model.loss import Lesson, reference_loss, supervised_loss, token_losses
from tests.model.parts import audio_batch
from tests.small import small_model

HIDDEN, VOCABULARY = 8, 23


def case(rows: int = 3, tokens: int = 11, bias: bool = False):
    hidden_states = torch.randn(rows, tokens, HIDDEN, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (rows, tokens)).masked_fill(torch.rand(rows, tokens) < 0.4, -100)
    return hidden_states, labels, nn.Linear(HIDDEN, VOCABULARY, bias=bias)


def with_gradients(function, hidden_states, labels, head, **keywords):
    hidden_states.grad = None
    head.zero_grad(set_to_none=True)
    loss, logits = function(hidden_states, labels, head, **keywords)
    loss.backward()
    return loss.detach(), hidden_states.grad.clone(), head.weight.grad.clone(), logits


def torch_loss(hidden_states, labels, head, softcap=None):
    logits = head(hidden_states)[:, :-1]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), ignore_index=-100
    ), logits


@pytest.mark.parametrize("rows_at_once", [1000, 4, 1])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_cross_entropy_in_value_and_gradients_whatever_the_chunks(monkeypatch, rows_at_once, softcap):
    monkeypatch.setattr(losses, "MAX_LOGITS_AT_ONCE", rows_at_once * VOCABULARY)
    hidden_states, labels, head = case(bias=True)
    expected = with_gradients(torch_loss, hidden_states, labels, head, softcap=softcap)
    got = with_gradients(supervised_loss, hidden_states, labels, head, softcap=softcap)
    for ours, theirs in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    plain, _ = reference_loss(hidden_states, labels, head, softcap=softcap)
    torch.testing.assert_close(plain, expected[0])


def test_shifted_labels_of_parts_of_a_row_give_the_loss_of_the_row():
    hidden_states, labels, head = case()
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    count = int((labels[:, 1:] != -100).sum())
    parts = zip(hidden_states.split(4, dim=1), labels.split(4, dim=1), shifted.split(4, dim=1), strict=True)
    found = [
        supervised_loss(hidden, of_part, head, shift_labels=targets, num_items_in_batch=count)[0]
        for hidden, of_part, targets in parts
    ]
    assert len(found) == 3
    torch.testing.assert_close(sum(found), supervised_loss(hidden_states, labels, head)[0])


def test_a_model_takes_shifted_labels_in_place_of_its_labels():
    model, ids = small_model(), torch.arange(12).view(2, 6)
    shifted = nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
    loss = model(input_ids=ids, labels=ids).loss
    assert torch.equal(model(input_ids=ids, labels=ids.flip(1), shift_labels=shifted).loss, loss)


def test_num_items_in_batch_divides_the_sum():
    hidden_states, labels, head = case()
    count = int((labels[:, 1:] != -100).sum())
    mean, _ = supervised_loss(hidden_states, labels, head)
    for items in (4 * count, torch.tensor(4 * count)):
        for function in (supervised_loss, reference_loss):
            loss, _ = function(hidden_states, labels, head, num_items_in_batch=items)
            torch.testing.assert_close(loss, mean / 4)


def test_last_logits_are_those_of_the_last_supervised_positions(monkeypatch):
    monkeypatch.setattr(losses, "MAX_LOGITS_AT_ONCE", 5 * VOCABULARY)
    hidden_states, labels, head = case()
    supervised = labels[:, 1:] != -100
    rest = int(supervised.sum()) % 5 or 5
    _, logits = supervised_loss(hidden_states, labels, head)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, head(hidden_states)[:, :-1][supervised][-rest:])
    _, every = reference_loss(hidden_states, labels, head)
    torch.testing.assert_close(every, head(hidden_states))


def test_without_a_supervised_token_loss_and_gradient_are_zero():
    hidden_states, labels, head = case()
    loss, grad, head_grad, _ = with_gradients(supervised_loss, hidden_states, torch.full_like(labels, -100), head)
    assert loss == 0
    assert not grad.any()
    assert not head_grad.any()


@pytest.mark.parametrize("rows_at_once", [1000, 3])
def test_what_stands_at_padding_reaches_no_loss_and_no_gradient(monkeypatch, rows_at_once):
    monkeypatch.setattr(losses, "MAX_LOGITS_AT_ONCE", 2 * rows_at_once * VOCABULARY)
    targets = torch.tensor([3, -100, 7, -100, -100, 1])
    real, taught = targets != -100, torch.tensor([True, False, False, False, False, True])
    hidden_states, teacher, head = torch.randn(6, HIDDEN), torch.randn(6, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)

    def found(lesson, keep, fill):
        inputs = torch.where(real[:, None], hidden_states, fill)[keep].requires_grad_()
        given = Lesson(torch.where(taught[:, None], teacher, fill)[keep], taught[keep], 0.4) if lesson else None
        head.zero_grad(set_to_none=True)
        tokens = token_losses(inputs, targets[keep], head, lesson=given)
        tokens.losses.sum().backward()
        own = inputs.grad[real[keep]]
        return tokens.losses[real[keep]].detach(), own, head.weight.grad, head.bias.grad, inputs.grad[~real[keep]]

    for lesson in (False, True):
        *alone, _ = found(lesson, real, 0.0)
        *padded, at_padding = found(lesson, torch.ones_like(real), math.nan)
        assert not at_padding.any()
        for value, wanted in zip(padded, alone, strict=True):
            torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("trained", [False, True])
def test_full_logits_exist_for_supervised_positions_alone(trained):
    hidden_states, labels, head = case(tokens=50)
    head.requires_grad_(trained)
    labels[:, 2:] = -100
    labels[:, 1] = 3
    shapes = []
    head.register_forward_hook(lambda module, given, output: shapes.append(output.shape))
    supervised_loss(hidden_states, labels, head)
    assert shapes == [(3, VOCABULARY)]


@pytest.mark.parametrize("rows_at_once", [1000, 4, 1])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("weight", [None, 0.3, 1.0])
def test_a_frozen_head_gives_the_losses_and_gradients_that_a_trained_one_does(
    monkeypatch, rows_at_once, softcap, weight
):
    """Its gradient is made in the forward pass, without autograd."""
    monkeypatch.setattr(losses, "MAX_LOGITS_AT_ONCE", 2 * rows_at_once * VOCABULARY)
    hidden_states, labels, head = case(bias=True)
    labels[:, 3:5] = 2  # of the targets, some at padding
    shifted, upstream = labels[:, 1:].flatten(), torch.rand(labels[:, 1:].numel())
    states = hidden_states[:, :-1].flatten(0, 1).detach().requires_grad_()
    taught = torch.rand(len(shifted)) < 0.7
    lesson = None if weight is None else Lesson(torch.randn_like(states), taught, weight)

    def found(trained: bool):
        head.requires_grad_(trained)
        tokens = token_losses(states, shifted, head, softcap=softcap, lesson=lesson)
        (gradient,) = torch.autograd.grad((tokens.losses * upstream).sum(), states)
        divergences = torch.zeros(()) if tokens.divergences is None else tokens.divergences
        return tokens.losses.detach(), divergences, gradient

    real = shifted != -100
    for mine, other in zip(found(False), found(True), strict=True):
        if mine.dim() and weight is not None:  # a teacher at padding counts nowhere
            mine, other = mine[real], other[real]
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=2e-5)


def lesson_for(labels, weight):
    taught = torch.rand(int((labels[:, 1:] != -100).sum())) < 0.7
    states = torch.randn(len(taught), HIDDEN)
    return Lesson(torch.where(taught[:, None], states, math.nan), taught, weight)


def taught_tokens(hidden_states, labels, head, lesson):
    supervised = labels[:, 1:] != -100
    return token_losses(hidden_states[:, :-1][supervised], labels[:, 1:][supervised], head, lesson=lesson)


def taught_loss(hidden_states, labels, head, lesson):
    found = taught_tokens(hidden_states, labels, head, lesson)
    return found.losses.mean(), found.last_logits


def plain_lesson(hidden_states, labels, head, lesson):
    """The textbook's sums, a position at a time."""
    supervised = labels[:, 1:] != -100
    logits, targets = head(hidden_states[:, :-1][supervised]).double(), labels[:, 1:][supervised]
    teachers, total, divergences = head(lesson.hidden_states).double().detach(), 0.0, 0.0
    for logit, target, taught, teacher in zip(logits, targets, lesson.taught, teachers, strict=True):
        own = -logit.log_softmax(-1)[target]
        if not taught:
            total = total + own
            continue
        meant = teacher.softmax(-1)
        divergence = (meant * (meant.log() - logit.log_softmax(-1))).sum()
        total, divergences = total + (1 - lesson.weight) * own + lesson.weight * divergence, divergences + divergence
    return total / len(targets), divergences


@pytest.mark.parametrize("rows_at_once", [1000, 4, 1])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_a_lesson_is_the_divergence_from_the_teacher_beside_cross_entropy_whatever_the_chunks(
    monkeypatch, rows_at_once, weight
):
    monkeypatch.setattr(losses, "MAX_LOGITS_AT_ONCE", 2 * rows_at_once * VOCABULARY)
    hidden_states, labels, head = case(bias=True)
    lesson = lesson_for(labels, weight)
    expected, divergence = plain_lesson(hidden_states, labels, head, lesson)
    grads = torch.autograd.grad(expected, (hidden_states, head.weight))
    got = with_gradients(taught_loss, hidden_states, labels, head, lesson=lesson)
    torch.testing.assert_close(got[0].double(), expected.detach(), atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(got[1:3], grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    found = taught_tokens(hidden_states, labels, head, lesson).divergences
    assert not found[~lesson.taught].any() and not found.requires_grad
    torch.testing.assert_close(found.sum().double(), divergence.detach(), atol=1e-5, rtol=1e-5)
    plain, _ = reference_loss(hidden_states, labels, head, lesson=lesson)
    torch.testing.assert_close(plain, got[0])


def test_a_lesson_of_no_weight_is_cross_entropy():
    hidden_states, labels, head = case()
    loss, _ = supervised_loss(hidden_states, labels, head)
    with_lesson, _ = taught_loss(hidden_states, labels, head, lesson_for(labels, 0.0))
    torch.testing.assert_close(with_lesson, loss)


def test_the_teacher_is_not_taught():
    hidden_states, labels, head = case()
    lesson = lesson_for(labels, 1.0)
    lesson.hidden_states.requires_grad_()
    loss, _ = taught_loss(hidden_states, labels, head, lesson)
    loss.backward()
    assert lesson.hidden_states.grad is None and hidden_states.grad.any()


def test_the_last_logits_are_kept_while_somebody_asks_for_them():
    model = small_model()
    model(**audio_batch(model))
    assert model.last_logits is None
    model.keep_last_logits = True
    model(**audio_batch(model))
    assert model.last_logits.shape == (4, model.lm_head.out_features) and not model.last_logits.requires_grad


def test_in_training_without_labels_the_last_logits_are_those_of_all_positions():
    model = small_model()
    model.keep_last_logits = True
    batch = {name: value for name, value in audio_batch(model).items() if name != "labels"}
    model.eval()(**batch)  # such as an answer in between
    assert model.last_logits is None
    logits = model.train()(**batch).logits
    assert logits.requires_grad and not model.last_logits.requires_grad
    torch.testing.assert_close(model.last_logits, logits.flatten(0, 1).detach(), rtol=0, atol=0)
