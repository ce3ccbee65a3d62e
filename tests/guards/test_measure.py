import math

import pytest
import torch
from torch import nn

from qwhisper.guards.decide import Decision
from qwhisper.guards.gradients import drop_gradients, scale_gradients, step_statistics


def group(*gradients):
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(len(gradient)))
        parameter.grad = torch.tensor(gradient)
        parameters.append(parameter)
    return parameters


def test_norms_are_per_group_and_frozen_groups_are_zero():
    frozen = [nn.Parameter(torch.zeros(3))]
    statistics = step_statistics(torch.tensor(0.5), {"lora": group([3.0, 0.0], [4.0]), "projector": frozen})
    assert statistics.loss == 0.5 and statistics.gradients == {"lora": 5.0, "projector": 0.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_element_shows_in_its_groups_norm_alone(value):
    statistics = step_statistics(torch.tensor(1.0), {"lora": group([1.0, value]), "projector": group([2.0])})
    assert not math.isfinite(statistics.gradients["lora"]) and statistics.gradients["projector"] == 2.0
    assert statistics.not_finite == ["gradient of lora"] and not statistics.broken_weights


def test_half_precision_gradients_are_measured_in_fp32():
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    parameter.grad = torch.full((4,), 60_000.0, dtype=torch.float16)
    assert step_statistics(torch.tensor(0.0), {"lora": [parameter]}).gradients["lora"] == pytest.approx(
        120_000, rel=1e-3
    )


def test_weights_are_measured_beside_their_gradients():
    groups = {"lora": [nn.Parameter(torch.tensor([3.0, 4.0]))], "projector": [nn.Parameter(torch.tensor([math.nan]))]}
    assert step_statistics(torch.tensor(0.0), groups).weights == {}
    statistics = step_statistics(torch.tensor(math.nan), groups)
    assert statistics.weights["lora"] == 5.0 and statistics.not_finite == ["weights of projector", "loss"]
    assert statistics.broken_weights


def test_gradients_whose_square_overflows_are_not_finite():
    assert step_statistics(torch.tensor(0.0), {"lora": group([1e30])}).not_finite == ["gradient of lora"]


def test_apply_scales_named_groups_and_drops_all():
    groups = {"lora": group([2.0]), "projector": group([2.0])}
    scale_gradients(Decision(skip=None, grad_norm=0.0, factors={"lora": 0.25}), groups)
    assert groups["lora"][0].grad.item() == 0.5 and groups["projector"][0].grad.item() == 2.0
    drop_gradients(groups)
    assert all(p.grad is None for parameters in groups.values() for p in parameters)
