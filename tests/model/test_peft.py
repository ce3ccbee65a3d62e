"""PEFT around our model: train, merge, save and load again, with the projector's weights; nothing is lost."""

import copy
import pickle
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers.integrations.peft import MIN_PEFT_VERSION

from qwhisper import Qwen3AudioForConditionalGeneration
from qwhisper.errors import UsageError
from qwhisper.model.lora import ADAPTER, add_lora
from tests.model.parts import logits, trained
from tests.small import small_model

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


def lora_config(**values):
    return LoraConfig(**{"r": 7, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **values})


SECOND = {
    "the same name": with_new_lora,
    "another name": lambda model, _: get_peft_model(model, lora_config(), adapter_name="second"),
    "other layers": lambda model, _: get_peft_model(model, lora_config(target_modules=r".*language_model.*down_proj")),
    "the encoder first": lambda model, _: get_peft_model(
        model, lora_config(target_modules=["q_proj", "fc1"], use_rslora=True)
    ),
    "all linears": lambda model, _: get_peft_model(model, lora_config(target_modules="all-linear")),
    "another kind": lambda model, _: get_peft_model(
        model, IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    ),
    "mixed kinds": lambda model, _: get_peft_model(model, lora_config(), adapter_name="second", mixed=True),
    "from a folder": PeftModel.from_pretrained,
    "from a folder, another name": lambda model, folder: PeftModel.from_pretrained(model, folder, "second"),
    "injected": lambda model, _: inject_adapter_in_model(lora_config(), model, "second"),
    "on the language model alone": lambda model, _: get_peft_model(
        model.model.language_model, lora_config(target_modules=["q_proj"]), adapter_name="second"
    ),
    "our own": lambda model, _: add_lora(model),
    "our own, elsewhere": lambda model, _: add_lora(model, target_modules=["up_proj"]),
}


def everything(model):
    modules = [(name, type(module)) for name, module in model.named_modules()]
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return modules, trainable, copy.deepcopy(model.peft_config), {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*second time", "ignore:.*multiple adapters", "ignore:.*was renamed")
@pytest.mark.parametrize(
    ("way", "family"),
    [*((way, "qwen3") for way in SECOND), ("all linears", "gpt2")],  # GPT-2's linears have another type
)
def test_a_second_adapter_beside_a_runs_is_refused_and_changes_nothing(way, family, model, tmp_path):
    model, target = (model, "q_proj") if family == "qwen3" else (small_model(family), "c_attn")
    trained(model, target_modules=[target]).save_pretrained(tmp_path / "run")
    before, modules, trainable, config, weights = logits(model), *everything(model)
    with pytest.raises(UsageError, match=r"has an adapter named 'default'.* merge it first"):
        SECOND[way](model, tmp_path / "run")
    assert torch.equal(logits(model), before)
    now = everything(model)
    assert now[:3] == (modules, trainable, config)
    assert now[3].keys() == weights.keys() and all(torch.equal(now[3][name], weights[name]) for name in weights)
    model.save_pretrained(tmp_path / "again")
    again = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again), before)


@pytest.mark.filterwarnings("ignore:the adapter is merged")
def test_the_adapter_of_a_run_is_merged_for_a_new_one(model, tmp_path):
    before = logits(trained(model))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
    model.save_pretrained(tmp_path)
    merged = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(with_new_lora(merged)), before, rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_runs_model_refuses_a_second_adapter_too(model):
    model = copy.deepcopy(trained(model))
    assert model.peft_config is model.model.language_model.peft_config
    assert pickle.loads(pickle.dumps(model.peft_config)) == model.peft_config
    with pytest.raises(UsageError, match="has an adapter named 'default'"):
        add_lora(model)


def test_after_its_adapter_was_deleted_a_model_takes_another(model):
    config = trained(model).peft_config.pop(ADAPTER)  # as transformers' delete_adapter
    model.peft_config["mine"] = config
    assert list(model.peft_config) == ["mine"]
