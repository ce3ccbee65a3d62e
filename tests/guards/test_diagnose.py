"""Which place is named for a value that is not finite, planted at known places of real small models."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from qwhisper.data.packing import pack_samples, pad_samples
from qwhisper.guards.diagnose import describe, diagnose
from qwhisper.model.attention import PACKED_ATTENTION, packed_attention_forward
from qwhisper.model.lora import add_lora
from qwhisper.train.models import checkpoint_activations
from tests.model.parts import make_sample
from tests.small import small_model

LM = "model.language_model"
LAYER = f"{LM}.layers.1"


def tuned(family="qwen3", *, lora=True, reentrant=None, dropout=0.0):
    torch.manual_seed(0)
    model = small_model(family)
    if lora:
        add_lora(model, dropout=dropout)
    if reentrant is not None:
        checkpoint_activations(model.model.language_model, use_reentrant=reentrant)
    return model.train()


def batch_for(model, *, packed=True):
    samples = [make_sample(model, [5, 6], [3000]), make_sample(model, [4, 3], [4000], seed=1)]
    return pack_samples(samples) if packed else pad_samples(samples, 0)


class WrongBackward(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, math.nan)


def before(module: nn.Module, effect, monkeypatch) -> None:
    """`effect` on the module's first input, inside of its forward pass."""
    honest = module.forward
    monkeypatch.setattr(module, "forward", lambda x, *args, **kwargs: honest(effect(x), *args, **kwargs))


def after(module: nn.Module, effect, monkeypatch) -> None:
    honest = module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: effect(honest(*args, **kwargs)))


@pytest.fixture
def attention_with():
    """A function that puts an effect on the query, or on the output, of the LM's second attention."""

    def plant(*, query=None, output=None) -> None:
        def planted(module, given, *args, **kwargs):
            if not (module.is_causal and module.layer_idx == 1):
                return packed_attention_forward(module, given, *args, **kwargs)
            made, weights = packed_attention_forward(module, query(given) if query else given, *args, **kwargs)
            return (output(made) if output else made), weights

        AttentionInterface.register(PACKED_ATTENTION, planted)

    yield plant
    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)


def one_nan(x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(torch.arange(x.numel()).view_as(x) == 3, math.nan)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_is_named_before_anything_runs(value):
    model = tuned()
    with torch.no_grad():
        model.get_submodule(f"{LAYER}.mlp.up_proj").lora_A["default"].weight[0, 3] = value
    finding = diagnose(model, {"no such argument": None})
    assert (finding.where, finding.when) == (f"{LAYER}.mlp.up_proj.lora_A.default.weight", "weight")
    assert finding.inputs[0]["nan"] + finding.inputs[0]["inf"] == 1


def test_an_input_of_the_batch_is_named_before_any_module():
    model = tuned()
    batch = batch_for(model)
    batch["audio_waveforms"][7] = math.nan
    finding = diagnose(model, batch)
    assert (finding.where, finding.when) == ("audio_waveforms", "batch") and finding.inputs[0]["nan"] == 1


@pytest.mark.parametrize(
    "where",
    [
        "model.audio_tower.layers.1.fc1",  # under no_grad
        "model.multi_modal_projector.linear_1",
        f"{LM}.layers.0.mlp.gate_proj.base_layer",
        f"{LAYER}.post_attention_layernorm",
        f"{LAYER}.mlp.down_proj",
        "lm_head",
    ],
)
def test_the_innermost_module_that_makes_a_nan_is_named_forward(where, monkeypatch):
    model = tuned()
    after(model.get_submodule(where), one_nan, monkeypatch)
    finding = diagnose(model, batch_for(model))
    assert (finding.where, finding.when) == (where, "forward")
    assert all(given["nan"] == given["inf"] == 0 for given in finding.inputs)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_nan_made_between_modules_names_the_one_around_them(reentrant, attention_with):
    attention_with(output=one_nan)
    model = tuned(reentrant=reentrant)
    finding = diagnose(model, batch_for(model))
    assert (finding.where, finding.when) == (f"{LAYER}.self_attn", "forward")


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_nan_of_the_second_run_under_checkpointing_is_named_forward(reentrant, monkeypatch):
    model, runs = tuned(reentrant=reentrant), []
    up = model.get_submodule(f"{LAYER}.mlp.up_proj")
    after(up, lambda x: runs.append(0) or x * [1.0, math.nan][len(runs) - 1], monkeypatch)
    finding = diagnose(model, batch_for(model))
    assert (finding.where, finding.when) == (f"{LAYER}.mlp.up_proj", "forward")


def test_an_overflow_is_named_with_what_went_in(monkeypatch):
    model = tuned()
    before(model.get_submodule(f"{LAYER}.mlp"), lambda x: x * 1e30, monkeypatch)
    finding = diagnose(model, batch_for(model))
    # silu(gate) * up is of the order of 1e60, and lies between the linears: in the mlp itself.
    assert (finding.where, finding.when) == (f"{LAYER}.mlp", "forward")
    assert 1 < finding.inputs[0]["finite_max"] < 10


@pytest.mark.parametrize(
    ("family", "lora", "reentrant"),  # Qwen3 has a norm between q_proj and attention, Llama and Qwen2.5 have none
    [
        ("qwen3", True, None),
        ("qwen3", True, False),
        ("qwen3", True, True),
        ("qwen3", False, None),
        ("llama", True, None),
    ],
)
def test_a_wrong_gradient_of_the_query_is_named_at_that_layers_q_proj(family, lora, reentrant, attention_with):
    attention_with(query=WrongBackward.apply)
    model = tuned(family, lora=lora, reentrant=reentrant)
    finding = diagnose(model, batch_for(model))
    assert (finding.where, finding.when) == (f"{LAYER}.self_attn.q_proj", "backward")
    assert f"finite at the output of {LAYER}.self_attn and not" in str(finding)
    activation, gradient = finding.inputs
    assert activation["nan"] == 0 and gradient["nan"] == math.prod(gradient["shape"])


def test_a_wrong_gradient_of_the_query_is_named_in_a_padded_batch_too(attention_with):
    attention_with(query=WrongBackward.apply)
    model = tuned()
    finding = diagnose(model, batch_for(model, packed=False))
    assert (finding.where, finding.when) == (f"{LAYER}.self_attn.q_proj", "backward")


@pytest.mark.parametrize(
    "where", [f"{LAYER}.self_attn.k_proj", f"{LAYER}.self_attn.q_norm", f"{LM}.layers.0.input_layernorm", "lm_head"]
)
def test_of_modules_that_share_an_input_the_one_with_the_wrong_gradient_is_named(where, monkeypatch):
    model = tuned()
    model.lm_head.requires_grad_(True)  # the gradient of a frozen one is made without its backward pass
    before(model.get_submodule(where), WrongBackward.apply, monkeypatch)
    finding = diagnose(model, batch_for(model))
    assert (finding.where, finding.when) == (where, "backward")
    assert "the gradient at its input is not finite, although" in str(finding)


def test_a_gradient_that_breaks_between_a_module_and_its_parts_names_the_module(monkeypatch):
    model = tuned()
    attention = model.get_submodule(f"{LAYER}.self_attn")
    honest = attention.forward

    def planted(hidden_states, **kwargs):
        return honest(hidden_states=WrongBackward.apply(hidden_states), **kwargs)

    monkeypatch.setattr(attention, "forward", planted)
    finding = diagnose(model, batch_for(model))
    assert (finding.where, finding.when) == (f"{LAYER}.self_attn", "backward")


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(
    "name",
    [f"{LAYER}.self_attn.q_proj.lora_A.default.weight", "model.multi_modal_projector.linear_2.bias"],
)
def test_a_parameters_own_wrong_gradient_names_the_parameter(name, reentrant):
    model = tuned(reentrant=reentrant)
    model.get_parameter(name).register_hook(one_nan)
    finding = diagnose(model, batch_for(model))
    assert (finding.where, finding.when) == (name, "backward")
    assert [given["nan"] for given in finding.inputs] == [0, 0]


def test_an_overflow_of_the_scaled_loss_is_found_at_its_scale_alone():
    model = tuned()
    batch = batch_for(model)
    assert diagnose(model, batch) is None
    # Divided by half a token, a logit has a gradient of up to 2; the scale makes it 2e38, and fp32 ends at 3.4e38.
    finding = diagnose(model, batch | {"num_items_in_batch": 0.5}, loss_scale=1e38)
    assert finding.when == "backward" and all(given["nan"] == given["inf"] == 0 for given in finding.inputs)


class Toy(nn.Module):
    """A loss out of two modules without a matrix, under a mask."""

    def __init__(self, effect=lambda x: x):
        super().__init__()
        self.inner, self.outer, self.effect = self.Inner(), nn.PReLU(), effect

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x, attention_mask):
            return (x * self.weight + attention_mask).amax()

    def forward(self, x, attention_mask):
        return SimpleNamespace(loss=self.effect(self.outer(self.inner(x, attention_mask=attention_mask))))


MASKED = {"x": torch.arange(4.0), "attention_mask": torch.tensor([0.0, 0.0, -math.inf, -math.inf])}


def test_minus_infinity_in_a_mask_is_sound(monkeypatch):
    model = Toy()
    assert diagnose(model, MASKED) is None
    after(model.inner, lambda x: x * math.nan, monkeypatch)
    assert diagnose(model, MASKED).where == "inner"


def test_a_wrong_gradient_that_comes_to_no_matrix_names_what_it_comes_to_first():
    finding = diagnose(Toy(WrongBackward.apply), MASKED)
    assert (finding.where, finding.when) == ("outer", "backward")
    assert "finite at the loss and not at the output of outer" in str(finding)


def hooks_of(model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    on_parameters = sum(len(p._backward_hooks or ()) for p in model.parameters())
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds) + on_parameters


@pytest.mark.parametrize("effect", [None, one_nan, "raises"])
def test_all_is_left_as_it_was_found(effect, monkeypatch):
    model = tuned(dropout=0.5)
    batch = batch_for(model)
    down = model.get_submodule(f"{LAYER}.mlp.down_proj")
    if effect == "raises":
        before(down, lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError), monkeypatch)
    elif effect:
        after(down, effect, monkeypatch)
    hooks, generator = hooks_of(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    if effect == "raises":
        with pytest.raises(torch.OutOfMemoryError):
            diagnose(model, batch)
    else:
        assert (diagnose(model, batch) is None) == (effect is None)
    assert hooks_of(model) == hooks and torch.equal(torch.get_rng_state(), generator)
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_under_no_grad_it_still_looks_at_the_backward_pass(attention_with):
    attention_with(query=WrongBackward.apply)
    model = tuned()
    with torch.no_grad():
        assert diagnose(model, batch_for(model)).when == "backward"


def test_nothing_trained_has_no_backward_pass():
    model = tuned(lora=False).requires_grad_(False)
    assert diagnose(model, batch_for(model)) is None


def test_a_finding_is_one_json_line_and_one_sentence(monkeypatch):
    model = tuned()
    after(model.get_submodule("lm_head"), one_nan, monkeypatch)
    finding = diagnose(model, batch_for(model))
    back = json.loads(json.dumps(finding.as_dict(), allow_nan=False))
    assert back["where"] == "lm_head" and back["inputs"][0]["shape"] == finding.inputs[0]["shape"]
    assert str(finding).startswith("forward: lm_head has finite inputs and an output that is not finite (input 0 [")
    assert "\n" not in str(finding)


def test_description_counts_and_measures_the_finite_part():
    tensor = torch.tensor([[1.0, -3.0, math.nan], [math.inf, -math.inf, 2.0]], dtype=torch.bfloat16)
    assert describe("x", tensor) == {
        "name": "x", "shape": [2, 3], "dtype": "bfloat16", "nan": 1, "inf": 2,
        "finite_min": -3.0, "finite_max": 2.0, "finite_mean_abs": 2.0,
    }  # fmt: skip
    nothing = describe("x", torch.tensor([math.nan]))
    assert nothing["finite_min"] is nothing["finite_max"] is nothing["finite_mean_abs"] is None
    # The sum of these would overflow fp32.
    assert describe("x", torch.full((4,), 3e38))["finite_mean_abs"] == pytest.approx(3e38)
