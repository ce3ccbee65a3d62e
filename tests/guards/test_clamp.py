"""The clamp on the first q_proj, and the rule that turns it on and off."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwhisper.data.packing import pack_samples
from qwhisper.guards.clamp import ActivationClamp, first_q_proj
from qwhisper.guards.state import CLAMP_BOUND as BOUND
from qwhisper.guards.state import CLAMP_CLEAN as CLEAN
from qwhisper.guards.state import CLAMP_SPIKES as SPIKES
from qwhisper.guards.state import CLAMP_WINDOW as WINDOW
from qwhisper.guards.state import ClampSwitch
from qwhisper.model.lora import add_lora, lora_parameters
from qwhisper.train.models import checkpoint_activations
from tests.model.parts import make_sample
from tests.small import small_model, text_config

OUTLIER = 3  # a channel


def changes(switch: ClampSwitch, spikes: set[int], steps: int) -> dict[int, str]:
    """Step to what the switch said, where it said anything; `spikes` counted from 1."""
    said = {step: switch.observe(step in spikes) for step in range(1, steps + 1)}
    return {step: change for step, change in said.items() if change}


def test_fewer_spikes_than_the_window_asks_for_change_nothing():
    assert SPIKES == 3
    spread = {1, 2, 1 + WINDOW, 2 + WINDOW, 1 + 2 * WINDOW}  # never three within one window
    assert changes(ClampSwitch(), spread, 4 * WINDOW) == {}


def test_the_third_spike_within_the_window_turns_it_on_and_clean_steps_off():
    assert changes(ClampSwitch(), {1, 2, WINDOW}, 2000) == {WINDOW: "on", WINDOW + CLEAN: "off"}


def test_a_spike_while_it_is_on_puts_off_the_end():
    late = 3 + CLEAN - 1
    assert changes(ClampSwitch(), {1, 2, 3, late}, 2000) == {3: "on", late + CLEAN: "off"}


def test_it_swings_no_faster_than_its_clean_steps():
    bursts = {start + i for start in range(0, 3000, 6 * WINDOW) for i in (1, 2, 3)}
    turned = changes(ClampSwitch(), bursts, 3000)
    assert list(turned.values()) == ["on", "off"] * 10
    times = list(turned)
    assert all(off - on == CLEAN for on, off in zip(times[::2], times[1::2], strict=True))


def test_its_state_goes_through_json_and_on_as_if_uninterrupted():
    spikes = {5, 30, 40, 45, 300, 301, 302}
    expected = changes(ClampSwitch(), spikes, 600)
    first = ClampSwitch()
    for cut in range(1, 60):
        first.observe(cut in spikes)
        second = ClampSwitch(**json.loads(json.dumps(dataclasses.asdict(first))))
        rest = {step: change for step in range(cut + 1, 601) if (change := second.observe(step in spikes))}
        assert rest == {step: change for step, change in expected.items() if step > cut}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
def test_the_first_q_proj_is_the_language_models_not_the_encoders(family, lora):
    model = small_model(family)
    if lora:
        add_lora(model)
    name, module = first_q_proj(model)
    assert name == "model.language_model.layers.0.self_attn.q_proj" and module is model.get_submodule(name)


def test_a_plain_causal_lm_has_one_and_gpt2_has_none():
    assert first_q_proj(AutoModelForCausalLM.from_config(text_config("llama")))[0] == "model.layers.0.self_attn.q_proj"
    assert first_q_proj(AutoModelForCausalLM.from_config(text_config("gpt2"))) is None
    assert first_q_proj(small_model("gpt2")) is None


def test_a_later_layers_q_proj_is_not_taken_for_the_first():
    model = small_model()
    layers = model.model.language_model.layers
    layers[0].self_attn.mixer = layers[0].self_attn.q_proj
    del layers[0].self_attn.q_proj
    assert first_q_proj(model) is None


def spiking_model(scale: float, family="qwen3"):
    """LoRA on q_proj alone, and an outlier channel of `scale` in what the first layer's attention reads.

    The frozen weights read nothing from that channel, as those of real models with massive activations hardly do; so
    attention is the same at any scale, and the channel shows where LoRA's A learns from it.
    """
    torch.manual_seed(0)
    model = small_model(family)
    add_lora(model, target_modules=["q_proj"])
    layer = model.model.language_model.layers[0]
    with torch.no_grad():
        for name, parameter in lora_parameters(model):
            parameter.normal_(0, 0.1)
            if name.endswith("layers.0.self_attn.q_proj.lora_A.default.weight"):
                parameter[:, OUTLIER] = 0.0
        layer.input_layernorm.weight[OUTLIER] = scale
        attention = layer.self_attn
        for linear in (attention.q_proj.base_layer, attention.k_proj, attention.v_proj):
            linear.weight[:, OUTLIER] = 0.0
    return model.train()


def batch_for(model):
    return pack_samples([make_sample(model, [5, 6], [3000]), make_sample(model, [4, 3], [4000], seed=1)])


def clamp_on(model, **values) -> ActivationClamp:
    return ActivationClamp(*first_q_proj(model), **{"on": True} | values)


def seen_by_q(model) -> list[torch.Tensor]:
    """What q_proj's own computation gets, after all pre-hooks on it."""
    seen = []
    first_q_proj(model)[1].base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    return seen


def gradient_norm(model, batch) -> float:
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_planted_outlier_is_bounded_and_the_gradient_comes_back_to_its_size(family):
    calm = spiking_model(1.0, family)
    batch = batch_for(calm)
    before = gradient_norm(calm, batch)
    model = spiking_model(1e4, family)
    seen = seen_by_q(model)
    spike = gradient_norm(model, batch)
    clamp = clamp_on(model)
    bounded = gradient_norm(model, batch)
    largest = [float(x.abs().max()) for x in seen]
    assert largest[0] > 1e3 and largest[1] == BOUND
    assert clamp.take_counts() == {clamp.name: int((seen[0].abs() > BOUND).sum())}
    # The channel's share of A's gradient grows with its values; bounded, they are at most 8 where others are about 1.
    assert spike > 20 * before and bounded < 4 * before


def test_nan_stays_nan_and_infinity_is_clamped_and_counted():
    model = spiking_model(1.0)
    name, module = first_q_proj(model)
    clamp, seen = clamp_on(model), seen_by_q(model)
    x = torch.zeros(1, 2, 32)
    x[0, 0, :5] = torch.tensor([math.nan, math.inf, -math.inf, 8.5, BOUND])
    module(x)
    assert seen[0][0, 0, :6].tolist()[1:] == [BOUND, -BOUND, BOUND, BOUND, 0.0] and seen[0][0, 0, 0].isnan()
    assert clamp.take_counts() == {name: 3} and clamp.take_counts() == {name: 0}


def test_the_gradient_is_zero_where_values_were_clamped_and_untouched_elsewhere():
    module = torch.nn.Linear(4, 1, bias=False)
    ActivationClamp("q", module, on=True, bound=2.0)
    x = torch.tensor([[1.0, -3.0, 2.0, 5.0]], requires_grad=True)
    module(x).backward()
    weight = module.weight.detach()[0]
    assert x.grad.tolist() == [[float(weight[0]), 0.0, float(weight[2]), 0.0]]


@pytest.mark.parametrize(("on", "training"), [(False, True), (True, False)])
def test_off_or_in_evaluation_it_does_nothing(on, training):
    model = spiking_model(1e4).train(training)
    batch = batch_for(model)
    plain = model(**batch).loss
    clamp = clamp_on(model, on=on)
    assert torch.equal(model(**batch).loss, plain) and clamp.take_counts() == {clamp.name: 0}


def test_removed_it_is_gone():
    model = spiking_model(1e4)
    seen, clamp = seen_by_q(model), clamp_on(model)
    clamp.remove()
    gradient_norm(model, batch_for(model))
    assert float(seen[0].abs().max()) > BOUND and clamp.take_counts() == {clamp.name: 0}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_each_value_once_and_clamps_both_times(reentrant):
    results = []
    for checkpointed in (False, True):
        model = spiking_model(1e4)
        if checkpointed:
            checkpoint_activations(model.model.language_model, use_reentrant=reentrant)
        clamp, seen = clamp_on(model), seen_by_q(model)
        norm = gradient_norm(model, batch_for(model))
        results.append((norm, clamp.take_counts()))
        assert all(float(x.abs().max()) == BOUND for x in seen) and len(seen) == 1 + checkpointed
    (plain, count), (again, count_again) = results
    assert again == pytest.approx(plain, rel=1e-6) and count_again == count and min(count.values()) > 0
