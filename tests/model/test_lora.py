import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from qwhisper.data.packing import pack_samples
from qwhisper.errors import UsageError
from qwhisper.model.lora import LoraConv1D, LoraLinear, add_lora, lm_linear_names, lora_parameters, target_regex
from tests.model.parts import logits, make_sample, trained
from tests.small import small_model

QWEN3_LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def lora_layers(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def test_every_linear_of_the_language_model_and_none_outside_is_adapted():
    model = small_model()
    assert lm_linear_names(model) == QWEN3_LINEARS
    add_lora(model)
    layers = lora_layers(model)
    assert len(layers) == 2 * len(QWEN3_LINEARS)
    assert all(name.startswith("model.language_model.layers.") for name in layers)
    assert {type(model.get_submodule(name)) for name in layers} == {LoraLinear}
    assert type(model.lm_head) is nn.Linear


def test_peft_suffixes_alone_would_have_hit_the_encoder():
    """What the anchored expression is for."""
    encoder_linears = {
        name.rsplit(".", 1)[-1]
        for name, m in small_model().model.audio_tower.named_modules()
        if isinstance(m, nn.Linear)
    }
    assert {"q_proj", "k_proj", "v_proj"} <= encoder_linears
    assert target_regex(["q_proj"]).startswith(r"model\.language_model\.")


def test_only_the_targets_asked_for_are_adapted():
    model = small_model()
    add_lora(model, target_modules=["q_proj", "v_proj"])
    assert {name.rsplit(".", 1)[-1] for name in lora_layers(model)} == {"q_proj", "v_proj"}
    with pytest.raises(UsageError, match="--lora_target_modules query: the language model has down_proj"):
        add_lora(small_model(), target_modules=["q_proj", "query"])


def test_a_and_b_are_fp32_on_a_bf16_base_and_the_base_stays():
    model = small_model()
    model.model.language_model.to(torch.bfloat16)
    add_lora(model)
    assert {p.dtype for _, p in lora_parameters(model)} == {torch.float32}
    assert {p.dtype for p in model.model.language_model.parameters() if not p.requires_grad} == {torch.bfloat16}
    add_lora(other := small_model().to(torch.bfloat16), fp32=False)
    assert {p.dtype for _, p in lora_parameters(other)} == {torch.bfloat16}


def test_b_is_zero_and_a_is_drawn_at_the_init_scale():
    spreads = {}
    for scale in (1.0, 0.1):
        torch.manual_seed(5)
        model = small_model()
        add_lora(model, init_scale=scale)
        assert not any(p.any() for name, p in lora_parameters(model) if "lora_B" in name)
        spreads[scale] = torch.cat([p.flatten() for name, p in lora_parameters(model) if "lora_A" in name]).detach()
    torch.testing.assert_close(spreads[0.1], 0.1 * spreads[1.0])
    assert spreads[1.0].std() > 0.05


def test_a_fresh_adapter_changes_no_output_and_a_used_one_does():
    model = small_model()
    row = pack_samples([make_sample(model, [5, 5], [2000])])
    before = model(**row).loss
    add_lora(model)
    assert torch.equal(model(**row).loss, before)
    with torch.no_grad():
        for _, parameter in lora_parameters(model):
            parameter.normal_(0, 0.3)
    assert abs(model(**row).loss - before) > 1e-3


def test_adapters_and_what_was_trainable_before_are_all_that_is_trained():
    model = small_model()
    add_lora(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        name for name in dict(model.named_parameters()) if "lora_" in name or "multi_modal_projector" in name
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_equals_peft_own_in_value_and_gradients(dtype):
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["x"])
    ours = LoraLinear(nn.Linear(16, 24).to(dtype), "default", config=config, r=4, lora_alpha=12)
    nn.init.normal_(ours.lora_B["default"].weight)
    for layer in (ours.lora_A["default"], ours.lora_B["default"]):
        layer.float()
    peft = copy.deepcopy(ours)
    peft.__class__ = PeftLinear
    x = torch.randn(3, 5, 16, dtype=dtype)
    results = []
    for layer in (ours, peft):
        inputs = x.clone().requires_grad_()
        output = layer(inputs)
        output.float().square().mean().backward()
        results.append([output, inputs.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad])
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.05}
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_no_fp32_copy_of_a_layers_input_is_kept_for_the_backward_pass():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["x"])
    layer = LoraLinear(
        nn.Linear(64, 64).bfloat16().requires_grad_(False), "default", config=config, r=4, lora_alpha=8
    ).bfloat16()
    layer.lora_A.float()
    layer.lora_B.float()

    def kept(module) -> int:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            module(torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True))
        return sum(t.numel() for t in saved if t.dtype == torch.float32 and t.numel() >= 6400)

    assert kept(layer) == 0
    layer.__class__ = PeftLinear
    assert kept(layer) > 0


def test_disabled_and_merged_adapters_go_pefts_own_way():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["x"])
    layer = LoraLinear(nn.Linear(16, 16), "default", config=config, r=4, lora_alpha=8)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 16)
    adapted = layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    layer.merge()
    torch.testing.assert_close(layer(x), adapted)


@pytest.mark.filterwarnings("error")
def test_gpt2s_linears_are_adapted_and_merged():
    model = small_model("gpt2")
    before = logits(model)
    trained(model, target_modules=["c_attn", "c_fc"])
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert {type(layer) for layer in layers} == {LoraConv1D}
    adapted = logits(model)
    assert not torch.allclose(adapted, before, atol=1e-2)
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    for layer in layers:
        layer.unmerge()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_adapters_input_in_training_alone():
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["x"])
    layer = LoraLinear(nn.Linear(16, 16), "default", config=config, r=4, lora_alpha=8, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
