"""Activations that go wrong: a diagnosis names where, and the clamp bounds outliers without hiding a NaN."""

import math
from contextlib import nullcontext

import torch
from transformers import AttentionInterface

from qwhisper.guards import clamp, diagnose
from qwhisper.guards.clamp import ActivationClamp, first_q_proj
from qwhisper.guards.decide import FIRST_NORMS
from qwhisper.guards.state import CLAMP_SPIKES as SPIKES
from qwhisper.guards.state import ClampSwitch
from qwhisper.model.attention import PACKED_ATTENTION, packed_attention_forward
from qwhisper.model.lora import lora_parameters
from qwhisper.report.events import read_jsonl
from qwhisper.train.monitor import log_window
from tests.test_faults.matrix import fault
from tests.train.helpers import make_run, same_bits, step, trainable

LM = "model.language_model"
OUTLIER = 3  # a channel


def without_look_at_weights(monkeypatch) -> None:
    monkeypatch.setattr(diagnose, "bad_weight", lambda model: None)


def without_hooks(monkeypatch) -> None:
    monkeypatch.setattr(diagnose._Trace, "hooks", lambda self: nullcontext())


def without_switch(monkeypatch) -> None:
    monkeypatch.setattr(ClampSwitch, "observe", lambda self, spiked: None)


def with_a_clamp_that_hides_nan(monkeypatch) -> None:
    monkeypatch.setattr(clamp, "clamped", lambda x, bound: torch.nan_to_num(x).clamp(-bound, bound))


def events_of(run) -> list[dict]:
    return read_jsonl(run.log.folder / "events.jsonl")


def finding_of(run, samples) -> tuple[str, str] | None:
    finding = diagnose.diagnose(run.executor.model, run.executor.batch(samples))
    return (finding.where, finding.when) if finding else None


@fault(
    "a NaN weight",
    of="numerical",
    guarantee="the diagnosis names the weight",
    without=without_look_at_weights,
)
def test_a_nan_weight_is_named(arguments):
    run, samples = make_run(arguments())
    name = f"{LM}.layers.1.self_attn.v_proj.lora_B.default.weight"
    with torch.no_grad():
        run.executor.model.get_parameter(name)[0, 0] = math.nan
    assert finding_of(run, samples[:1]) == (name, "weight")


@fault(
    "a NaN activation in a middle layer",
    of="numerical",
    guarantee="the diagnosis names the module that made it from finite inputs",
    without=without_hooks,
)
def test_a_nan_activation_is_named_by_its_module(arguments):
    run, samples = make_run(arguments())
    name = f"{LM}.layers.0.mlp.up_proj"
    run.executor.model.get_submodule(name).register_forward_hook(lambda module, args, output: output * math.nan)
    assert finding_of(run, samples[:1]) == (name, "forward")


class WrongBackward(torch.autograd.Function):
    """The identity, with a gradient of NaN: cuDNN's attention does so to the query (pytorch#196678)."""

    @staticmethod
    def forward(ctx, query):
        return query.view_as(query)

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, math.nan)


@fault(
    "an attention kernel whose backward pass gives NaN in the query's gradient",
    of="numerical",
    guarantee="the diagnosis names that layer's q_proj, and that the gradient broke on its way to it",
    without=without_hooks,
)
def test_a_wrong_backward_of_attention_is_named_at_q_proj(arguments):
    def planted(module, query, *args, **kwargs):
        hit = module.is_causal and module.layer_idx == 1
        return packed_attention_forward(module, WrongBackward.apply(query) if hit else query, *args, **kwargs)

    run, samples = make_run(arguments())
    AttentionInterface.register(PACKED_ATTENTION, planted)
    try:
        found = finding_of(run, samples[:1])
    finally:
        AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    assert found == (f"{LM}.layers.1.self_attn.q_proj", "backward")


def plant_outlier(model, scale: float) -> None:
    """A channel of `scale` before the first layer's attention; of frozen weights none reads it, so LoRA alone does."""
    layer = model.get_submodule(f"{LM}.layers.0")
    attention = layer.self_attn
    with torch.no_grad():
        layer.input_layernorm.weight[OUTLIER] = scale
        for linear in (attention.q_proj.base_layer, attention.k_proj, attention.v_proj):
            linear.weight[:, OUTLIER] = 0.0


@fault(
    "an outlier channel in the first layer's activations",
    of="numerical",
    guarantee="after three spikes the clamp bounds it, counts it by module, and the gradient is back at its size",
    without=without_switch,
)
def test_a_planted_outlier_is_clamped_and_counted(arguments):
    run, samples = make_run(arguments(lora_target_modules=["q_proj"], activation_clamp="auto", learning_rate=1e-9))
    with torch.no_grad():
        for name, parameter in lora_parameters(run.executor.model):
            parameter.normal_(0, 0.1)
            if name.endswith(".0.self_attn.q_proj.lora_A.default.weight"):
                parameter[:, OUTLIER] = 0.0
    plant_outlier(run.executor.model, 1.0)
    calm = [step(run, samples[:4]).group_norms["lora"] for _ in range(FIRST_NORMS)]
    assert events_of(run) == []
    plant_outlier(run.executor.model, 1e6)
    spikes = [step(run, samples[:4]).group_norms["lora"] for _ in range(SPIKES)]
    after = step(run, samples[:4])
    assert min(spikes) > 1000 * max(calm) and after.group_norms["lora"] < 3 * max(calm)
    log_window(run, [after], 1e-9)
    *named, turned, clamped = events_of(run)
    assert [event["kind"] for event in named] == ["gradient_spike"] * SPIKES
    assert (turned["kind"], turned["turned"]) == ("activation_clamp", "on")
    assert clamped["kind"] == "activations_clamped" and clamped["values"][turned["module"]] > 0
    assert turned["module"] == f"{LM}.layers.0.self_attn.q_proj"


@fault(
    "a NaN among activations that are clamped",
    of="numerical",
    guarantee="the clamp leaves it, the finite check sees it, the weights stay as they are",
    without=with_a_clamp_that_hides_nan,
)
def test_a_nan_passes_the_clamp_unhidden(arguments):
    run, samples = make_run(arguments(freeze_projector_steps=0))
    name, q_proj = first_q_proj(run.executor.model)
    channel = torch.arange(32) == OUTLIER
    q_proj.register_forward_pre_hook(lambda module, args: (args[0].masked_fill(channel.to(args[0].device), math.nan),))
    ActivationClamp(name, q_proj, on=True)
    before = trainable(run)
    report = step(run, samples[:4])
    assert report.skipped and same_bits(before, trainable(run)) == []
