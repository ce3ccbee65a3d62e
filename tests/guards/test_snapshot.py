import math

import pytest
import torch
from torch import nn

from qwhisper.guards.snapshot import Snapshots, was_stepped


@pytest.fixture
def parts():
    torch.manual_seed(0)
    groups = {"lora": [nn.Parameter(torch.randn(4, 3))], "projector": [nn.Parameter(torch.randn(5))]}
    optimizer = torch.optim.AdamW([p for parameters in groups.values() for p in parameters], lr=0.1)
    return groups, optimizer, Snapshots(groups, optimizer)


def step(groups, optimizer, only=("lora", "projector")):
    for name in only:
        for parameter in groups[name]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def bits(groups, optimizer):
    parameters = [p for group in groups.values() for p in group]
    states = [optimizer.state[p] if was_stepped(optimizer.state[p]) else {} for p in parameters]
    moments = [{key: value.clone() for key, value in state.items()} for state in states]
    return [p.detach().clone() for p in parameters], moments


def addresses(groups, optimizer) -> list[int]:
    """Where weights and moments are in memory."""
    parameters = [p for group in groups.values() for p in group]
    return [tensor.data_ptr() for p in parameters for tensor in (p, *optimizer.state[p].values())]


def same(first, second) -> bool:
    weights = all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    moments = all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first[1], second[1], strict=True)
    )
    return weights and moments


def test_what_comes_back_is_bit_identical_also_before_a_parameters_first_step(parts):
    groups, optimizer, snapshots = parts
    step(groups, optimizer, only=("lora",))
    expected = bits(groups, optimizer)
    assert snapshots.take(1)
    for _ in range(3):
        step(groups, optimizer)
    assert not same(bits(groups, optimizer), expected)
    places = addresses(groups, optimizer)
    assert snapshots.restore() == 1
    assert same(bits(groups, optimizer), expected)
    step(groups, optimizer)  # the copy is not what now moves
    assert snapshots.restore() == 1
    assert same(bits(groups, optimizer), expected) and addresses(groups, optimizer) == places


def test_after_a_rewind_to_before_its_first_step_a_parameter_learns_as_if_it_had_never_been_stepped(parts):
    groups, optimizer, snapshots = parts
    snapshots.take(0)
    torch.manual_seed(1)
    step(groups, optimizer)
    expected = bits(groups, optimizer)
    step(groups, optimizer)
    snapshots.restore()
    assert not any(was_stepped(moments) for moments in optimizer.state.values())
    torch.manual_seed(1)
    step(groups, optimizer)
    assert same(bits(groups, optimizer), expected)


def test_moments_of_zeros_are_not_saved(parts):
    groups, optimizer, snapshots = parts
    snapshots.take(0)
    step(groups, optimizer, only=("lora",))
    snapshots.restore()
    step(groups, optimizer, only=("projector",))
    snapshots.take(1)
    saved = {key for key in snapshots.as_tensors() if key.startswith("1|")}
    assert saved == {"1|0|weight", *(f"1|1|{name}" for name in ("weight", "step", "exp_avg", "exp_avg_sq"))}


def test_the_second_rewind_without_a_new_copy_goes_further_back(parts):
    groups, optimizer, snapshots = parts
    for number in (1, 2, 3):
        snapshots.take(number)
        step(groups, optimizer)
    assert [snapshots.restore() for _ in range(3)] == [3, 2, 2]
    snapshots.take(4)
    assert snapshots.restore() == 4


def test_what_was_saved_goes_on_as_if_nothing_had_been(parts):
    groups, optimizer, snapshots = parts
    for number in (1, 2):
        snapshots.take(number)
        step(groups, optimizer)
    assert snapshots.restore() == 2  # so that the next one goes further back
    again = Snapshots(groups, optimizer)
    again.load(snapshots.as_tensors())
    assert again.restore() == snapshots.restore() == 1
    expected = bits(groups, optimizer)
    step(groups, optimizer)
    assert again.restore() == 1 and same(bits(groups, optimizer), expected)


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_a_number_that_is_not_finite_is_never_kept(parts, where):
    groups, optimizer, snapshots = parts
    step(groups, optimizer)
    snapshots.take(1)
    parameter = groups["lora"][0]
    (parameter.data if where == "weight" else optimizer.state[parameter]["exp_avg"])[0, 0] = math.nan
    assert not snapshots.take(2)
    assert snapshots.restore() == 1 and torch.isfinite(parameter).all()
