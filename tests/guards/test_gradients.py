"""Statistics of a step, a decision carried out on its gradients, and checksums of the weights."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qwhisper.checksums import changed, checksums
from qwhisper.guards.decide import Decision
from qwhisper.guards.gradients import (
    drop_gradients,
    frozen_parameters,
    group_checksums,
    norm_of,
    scale_gradients,
    step_statistics,
)


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


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float64, torch.int8, torch.bool)


def of(tensor: torch.Tensor) -> int:
    return checksums([("it", tensor)])["it"]


def random_bits(dtype: torch.dtype, numel: int) -> torch.Tensor:
    size = torch.empty((), dtype=dtype).element_size()
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (numel * size,), dtype=torch.uint8)
    return bits.view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(numel=st.integers(1, 40), where=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_single_bit_shows_in_any_dtype_and_length(dtype, numel, where, bit):
    tensor = random_bits(dtype, numel)
    before = of(tensor)
    bits = tensor.view(torch.uint8)
    bits[where % bits.numel()] ^= 1 if dtype == torch.bool else 1 << bit
    assert of(tensor) != before
    bits[where % bits.numel()] ^= 1 if dtype == torch.bool else 1 << bit
    assert of(tensor) == before


def test_each_word_counts_by_its_place_modulo_2_to_the_64():
    words = torch.tensor([2**62, 2**62, 2**62, 5], dtype=torch.int64)
    expected = (2**62 * (1 + 3 + 5) + 5 * 7 + 2**63) % 2**64 - 2**63
    assert of(words.view(torch.float32)) == of(words.view(torch.bfloat16).view(4, 4)) == expected
    assert of(torch.tensor([1, 0, 2], dtype=torch.uint8)) == 1 + 2 * 2**16


@pytest.mark.parametrize("columns", [3, 8, 1000, 2048])
def test_rows_that_change_places_show(columns):
    tensor = torch.randn(500, columns)  # from less than one row of the checksum to eight
    swapped = tensor.clone()
    swapped[[3, 400]] = tensor[[400, 3]]
    assert of(swapped) != of(tensor)
    swapped[[3, 400]] = swapped[[400, 3]]
    assert of(swapped) == of(tensor)


def test_nan_negative_zero_and_infinity_are_bits_like_any_others():
    values = torch.tensor([math.nan, 0.0, math.inf, 1.0])
    assert of(values) == of(values.clone())
    assert of(values) != of(torch.tensor([math.nan, -0.0, math.inf, 1.0]))


def test_layout_does_not_matter_where_the_values_are_the_same():
    tensor = torch.randn(6, 5, dtype=torch.float32).to(torch.bfloat16)
    row = torch.randn(20).to(torch.bfloat16)
    assert of(tensor.T) == of(tensor.T.contiguous())
    assert of(row[3:17]) == of(row[3:17].clone())  # starts within a word
    assert isinstance(of(torch.tensor(2.5)), int) and of(torch.empty(0)) == 0
    assert checksums([]) == {}


def test_changed_names_what_differs_and_what_is_missing():
    assert changed({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 4}) == ["b", "c", "d"]
    assert changed({"a": 1}, {"a": 1}) == []


def test_frozen_parameters_are_those_that_nothing_may_write_to():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model[0].register_buffer("inv_freq", torch.ones(3))
    model[2] = nn.Linear(2, 2, device="meta").requires_grad_(False)
    assert [name for name, _ in frozen_parameters(model)] == ["0.weight", "0.bias"]


def test_4_bit_weights_count_with_their_scales():
    quant_state = SimpleNamespace(absmax=torch.ones(2))
    weight = SimpleNamespace(requires_grad=False, is_meta=False, quant_state=quant_state)
    model = SimpleNamespace(named_parameters=lambda: [("weight", weight)])
    assert [name for name, _ in frozen_parameters(model)] == ["weight", "weight.absmax"]


def test_the_last_steps_of_a_cosine_move_the_checksum_but_not_the_norm():
    """Why a group's norm would not do: 10 updates of at most 7e-11 are under its last bit, but not under a weight's."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.empty(100_000).uniform_(-0.02, 0.02))
    groups = {"projector": [weight, nn.Parameter(torch.ones(64))]}
    optimizer = torch.optim.AdamW(groups["projector"], weight_decay=0.0)
    norm, sums = float(norm_of([p.detach() for p in groups["projector"]])), group_checksums(groups)
    for step in range(9_990, 10_000):
        optimizer.param_groups[0]["lr"] = 3e-5 * 0.5 * (1 + math.cos(math.pi * step / 10_000))
        for parameter in groups["projector"]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert float(norm_of([p.detach() for p in groups["projector"]])) == norm
    assert group_checksums(groups) != sums


def test_a_group_is_judged_by_all_of_its_weights():
    groups = {
        "lora": [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))],
        "projector": [nn.Parameter(torch.ones(4))],
    }
    before = group_checksums(groups)
    with torch.no_grad():
        groups["lora"][1][1] = 1 + 2**-23  # fp32's next number
    after = group_checksums(groups)
    assert after["lora"] != before["lora"] and after["projector"] == before["projector"]
