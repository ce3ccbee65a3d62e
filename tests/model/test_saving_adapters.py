"""An adapter is saved wherever it is, with all that was trained beside it, or refused by name."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from qwhisper import Qwen3AudioForConditionalGeneration
from qwhisper.errors import UsageError
from qwhisper.model.lora import add_lora
from tests.model.parts import TRAINED, WHOLE, kind, logits, lora, reloaded, step

pytestmark = pytest.mark.usefixtures("on_the_cpu")
LM_ONLY = r"model\.language_model\..*\.(q_proj|v_proj)"


@pytest.mark.parametrize("way", ["unload", "attached"])
@pytest.mark.filterwarnings("ignore:the adapter is merged")
def test_merged_lora_is_saved_with_the_weights_that_it_was_merged_into(model, tmp_path, way):
    plain = logits(model)
    peft = lora(model, target_modules=LM_ONLY)
    model.save_pretrained(tmp_path)  # its adapter must not be loaded on top of the merged weights below
    if way == "unload":
        model = peft.merge_and_unload()
    else:
        peft.merge_adapter()
    again = reloaded(model, tmp_path, WHOLE)
    assert not torch.allclose(logits(again), plain)
    assert not (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "adapter_config.json").exists()


def test_lora_that_is_merged_in_some_layers_only_is_refused(model, tmp_path):
    add_lora(model)
    next(module for module in model.modules() if isinstance(module, LoraLayer)).merge()
    with pytest.raises(UsageError, match="merged in some layers only"):
        model.save_pretrained(tmp_path)


PATTERN = r".*layers\.0\.self_attn\.q_proj"


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True, "exclude_modules": r".*language_model.layers\.0.*"},
        {"lora_bias": True, "use_rslora": True, "layers_to_transform": [1]},
        {"rank_pattern": {PATTERN: 2}, "alpha_pattern": {PATTERN: 3}},
    ],
)
def test_a_users_lora_learns_and_is_saved_wherever_it_is(model, tmp_path, values):
    """In the encoder, the projector and the language model."""
    lora(model, target_modules=["q_proj", "v_proj", "linear_1"], **values)
    model.model.multi_modal_projector.requires_grad_(True)
    assert any("audio_tower" in name for name, p in model.named_parameters() if p.requires_grad)
    step(model)
    model.eval()
    model.save_pretrained(tmp_path)
    again = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in tensors.items())
    step(again)  # what was loaded can be trained further


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"modules_to_save": ["lm_head"]}, WHOLE),
        ({"modules_to_save": ["multi_modal_projector"]}, TRAINED),
        ({"modules_to_save": ["layer_norm"]}, TRAINED),  # the encoder's
        ({"bias": "all"}, TRAINED),  # only the encoder has any
    ],
)
def test_what_peft_trains_beside_lora_is_saved_too(model, tmp_path, values, expected):
    lora(model, **values)
    before = logits(model)
    step(model)
    model.eval()
    model.save_pretrained(tmp_path)
    assert kind(tmp_path) == expected
    again = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model))
    assert not torch.allclose(logits(again), before)


def test_an_adapter_of_another_name_is_saved_and_two_are_refused(model, tmp_path):
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=LM_ONLY, init_lora_weights=False), adapter_name="mine")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path)), logits(model))
    peft.add_adapter("other", LoraConfig(r=2, target_modules=LM_ONLY, init_lora_weights=False))
    with pytest.raises(UsageError, match=r"one adapter, and this model has mine, other: delete_adapter"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("target", [r".*language_model.*q_proj", ["q_proj"]])
@pytest.mark.parametrize(("rank", "alpha"), [(2, 40), (3, 8), (16, 8)])
@pytest.mark.filterwarnings("ignore:.*second time", "ignore:.*multiple adapters")
def test_an_adapter_that_was_added_again_for_some_layers_is_saved_with_the_scale_of_each(
    model, tmp_path, rank, alpha, target
):
    lora(model, r=2, lora_alpha=4, target_modules=LM_ONLY)
    again = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target, init_lora_weights=False)
    get_peft_model(model, again)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path)), logits(model))


def test_an_adapter_whose_scale_was_changed_is_refused(model, tmp_path):
    add_lora(model)
    next(module for module in model.modules() if isinstance(module, LoraLayer)).scale_layer(0.5)
    with pytest.raises(UsageError, match=r"q_proj: its adapter has another scale .* merge it first"):
        model.save_pretrained(tmp_path)


def test_an_adapter_that_could_not_be_loaded_again_is_refused(model, tmp_path):
    lora(model, target_modules=[], target_parameters=["q_proj.weight"])
    with pytest.raises(UsageError, match=r"target_parameters .* merge it into the model first"):
        model.save_pretrained(tmp_path)


def test_an_adapter_of_another_kind_is_refused_by_its_weights(model, tmp_path):
    get_peft_model(model, IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    with pytest.raises(UsageError, match=r"no place .*ia3_l"):
        model.save_pretrained(tmp_path)
