"""PEFT around our model: train, merge, save and load again, with the projector's weights; nothing is lost."""

import copy
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers.integrations.peft import MIN_PEFT_VERSION

from qwhisper import Qwen3AudioForConditionalGeneration
from qwhisper.errors import UsageError
from tests.model.parts import logits, trained

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TARGETS = r"model\.language_model\..*\.(q_proj|v_proj|down_proj)"


def with_new_lora(model, folder=None):
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["multi_modal_projector"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@pytest.fixture
def peft_model(model):
    wrapped = with_new_lora(model)
    torch.manual_seed(1)
    with torch.no_grad():  # as if trained: LoRA's B is zero otherwise
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped.eval()


def test_lora_and_projector_are_what_is_trained(peft_model):
    names = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in names) and any("multi_modal_projector" in name for name in names)
    assert all("language_model" in name or "multi_modal_projector" in name for name in names)


def test_pefts_own_folder_restores_adapter_and_projector(peft_model, joined_once, tmp_path):
    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(joined_once()[0]), tmp_path).eval()
    assert torch.equal(logits(again), logits(peft_model))
    assert not torch.equal(logits(again), logits(joined_once()[0]))


def test_a_merged_model_answers_the_same_and_is_saved_whole(peft_model, tmp_path):
    before = logits(peft_model)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged))


def test_the_model_inside_saves_a_folder_of_ours(peft_model, tmp_path):
    peft_model.get_base_model().save_pretrained(tmp_path)
    again = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(peft_model))


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION), reason="transformers refuses this PEFT in add_adapter"
)
def test_an_adapter_of_the_librarys_is_switched_and_saved(model, tmp_path):
    plain = logits(model)
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    adapted = logits(model)
    assert not torch.equal(adapted, plain)
    with torch.no_grad():
        model.disable_adapters()
        assert torch.equal(logits(model), plain)
        model.enable_adapters()
    assert torch.equal(logits(model), adapted)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path)), adapted)


@pytest.mark.filterwarnings("ignore:.*second time", "ignore:.*multiple adapters", "ignore:.*was renamed")
@pytest.mark.parametrize("way", [with_new_lora, PeftModel.from_pretrained])
def test_peft_does_not_replace_the_adapter_of_a_run(model, tmp_path, way):
    trained(model).save_pretrained(tmp_path)
    before = logits(model)
    with pytest.raises(UsageError, match=r"an adapter named 'default'.* merge it first"):
        way(model, tmp_path)
    assert torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore:the adapter is merged")
def test_the_adapter_of_a_run_is_merged_for_a_new_one(model, tmp_path):
    before = logits(trained(model))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
    model.save_pretrained(tmp_path)
    merged = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(with_new_lora(merged)), before, rtol=1e-4, atol=1e-4)
