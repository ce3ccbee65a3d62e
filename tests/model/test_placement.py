"""A model cast to another dtype, or with weights that accelerate keeps elsewhere, computes what it did."""

import copy

import accelerate
import pytest
import torch
from transformers import AutoModelForMultimodalLM

from qwhisper import Qwen3AudioForConditionalGeneration
from qwhisper.model.lora import add_lora, lora_parameters
from tests.model.test_generation import GREEDY, rows
from tests.small import small_model

CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "to, with device": lambda model: model.to("cpu", torch.bfloat16),
    "its body": lambda model: model.model.half() and model.lm_head.half() and model,
    "from a configuration": lambda model: AutoModelForMultimodalLM.from_config(model.config, dtype=torch.bfloat16),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small_model().eval()


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_of_the_whole_model_leaves_the_projector_in_fp32(model, cast):
    before = copy.deepcopy(model.model.multi_modal_projector.state_dict())
    found = CASTS[cast](model)
    assert found.model.language_model.dtype == found.model.audio_tower.dtype in (torch.float16, torch.bfloat16)
    after = found.model.multi_modal_projector.state_dict()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    if found is model:
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert found(**rows(found)).logits.isfinite().all()


def test_whoever_casts_the_projector_itself_may(model):
    projector = model.model.multi_modal_projector
    projector.half()
    assert projector.linear_1.weight.dtype == torch.float16
    model.bfloat16()
    assert projector.linear_1.weight.dtype == torch.bfloat16  # no narrower than it was
    model.float()
    assert projector.linear_1.weight.dtype == torch.float32
    assert model.to("meta").model.multi_modal_projector.norm.weight.device.type == "meta"


def test_loading_in_another_dtype_leaves_the_projector_in_fp32(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.multi_modal_projector.linear_1.weight.dtype == torch.float32


def offloaded(model, way, folder):
    if way == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if way == "disk":
        return accelerate.disk_offload(model, str(folder / "offload"), execution_device="cpu")
    model.save_pretrained(folder / "saved")
    part = {"model.language_model": "cpu", "lm_head": "cpu", "model.multi_modal_projector": "cpu"}
    places = {"encoder": {"model.audio_tower": "disk"} | part, "projector": part | {
        "model.audio_tower": "cpu", "model.multi_modal_projector": "disk"}, "language model": part | {
        "model.audio_tower": "cpu", "model.language_model": "disk"}}  # fmt: skip
    return Qwen3AudioForConditionalGeneration.from_pretrained(
        folder / "saved", device_map=places[way], offload_folder=str(folder / "offload")
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("way", ["cpu", "disk", "encoder", "projector", "language model"])
def test_offloaded_weights_give_the_same_logits_and_answer(model, way, tmp_path):
    batch = rows(model)
    logits, answer = model(**batch).logits, model.generate(**batch, **GREEDY)
    found = offloaded(model, way, tmp_path)
    assert any(parameter.device.type == "meta" for parameter in found.parameters())
    assert torch.equal(found(**batch).logits, logits)
    assert torch.equal(found.generate(**batch, **GREEDY), answer)


@torch.no_grad()
@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_an_offloaded_adapter_gives_the_same_logits(model, way, tmp_path):
    add_lora(model, r=4, alpha=8)
    for _, parameter in lora_parameters(model):
        parameter.normal_(std=0.1)
    batch = rows(model)
    logits = model.eval()(**batch).logits
    found = offloaded(model, way, tmp_path)
    assert all(parameter.is_meta for _, parameter in lora_parameters(found))
    torch.testing.assert_close(found(**batch).logits, logits)
