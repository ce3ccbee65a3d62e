import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    CohereConfig,
    PhiConfig,
    WhisperForConditionalGeneration,
)

from qwhisper import Qwen3AudioConfig, Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.model.bases import LoadOptions, fingerprint
from qwhisper.model.loading import load_trained_weights
from qwhisper.model.lora import add_lora, lora_parameters
from qwhisper.model.qwen3_audio import build_from_bases, load_trained
from tests.model.parts import logits, trained
from tests.small import SHAPE, small_model, whisper_config


@pytest.fixture(scope="module")
def saved_once(joined_once, tmp_path_factory):
    torch.manual_seed(0)
    folder, (model, processor) = tmp_path_factory.mktemp("saved"), copy.deepcopy(joined_once())
    trained(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """(trained model, the folder it was saved to with its processor): copies for every test"""
    return copy.deepcopy(saved_once[0]), shutil.copytree(saved_once[1], tmp_path / "trained")


def test_trained_weights_alone_restore_the_whole_bit_for_bit(saved):
    model, folder = saved
    assert sorted(f.name for f in folder.glob("*.safetensors")) == [
        "adapter_model.safetensors",
        "projector.safetensors",
    ]
    again = Qwen3AudioForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(logits(again), logits(model))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trainable
    assert not again.training


def test_the_adapter_names_its_base(saved, bases):
    _, folder = saved
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == bases[1]
    assert not any("multi_modal_projector" in key for key in load_file(folder / "adapter_model.safetensors"))


def test_the_auto_classes_load_the_folder(saved):
    model, folder = saved
    assert type(AutoConfig.from_pretrained(folder)) is Qwen3AudioConfig
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is Qwen3AudioProcessor
    assert processor.frames == model.config.frames
    again = AutoModelForMultimodalLM.from_pretrained(folder, dtype=model.model.language_model.dtype)
    assert type(again) is Qwen3AudioForConditionalGeneration
    assert torch.equal(logits(again), logits(model))


def test_a_loaded_model_can_be_saved_and_loaded_again(saved, tmp_path):
    model, folder = saved
    Qwen3AudioForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path / "twice")), logits(model))


def test_an_unknown_keyword_is_refused_with_those_that_are_known(saved):
    with pytest.raises(
        UsageError, match=r"loading it does not take whatever. It takes dtype, device_map, .*text_model"
    ):
        Qwen3AudioForConditionalGeneration.from_pretrained(saved[1], whatever=1)


@pytest.mark.parametrize("auto", [Qwen3AudioForConditionalGeneration, AutoModelForMultimodalLM])
def test_what_is_not_honoured_is_refused_by_name(saved, auto):
    model, folder = saved
    own = AutoConfig.from_pretrained(folder)
    assert torch.equal(logits(auto.from_pretrained(folder, config=own, trust_remote_code=False)), logits(model))
    own.projector_scale = 3.0
    with pytest.raises(UsageError, match=r"the given config differs in projector_scale, but trained weights"):
        auto.from_pretrained(folder, config=own)
    with pytest.raises(UsageError, match=r"trust_remote_code=True has no effect: no code of a checkpoint"):
        auto.from_pretrained(folder, trust_remote_code=True)


OURS, AUTO, SLOW = Qwen3AudioForConditionalGeneration, AutoModelForMultimodalLM, pytest.mark.slow


@pytest.mark.parametrize(
    ("auto", "name", "encoder", "text"),
    [
        (OURS, "sdpa", "qwhisper_packed", "qwhisper_packed"),
        (AUTO, "sdpa", "qwhisper_packed", "qwhisper_packed"),
        pytest.param(OURS, "eager", "eager", "eager", marks=SLOW),
        (AUTO, "eager", "eager", "eager"),
        (OURS, {"text_config": "eager"}, "qwhisper_packed", "eager"),
        pytest.param(AUTO, {"text_config": "eager"}, "qwhisper_packed", "eager", marks=SLOW),
    ],
)
def test_an_attention_that_is_asked_for_is_set_so_that_windows_stay_apart(saved, tmp_path, auto, name, encoder, text):
    whole = tmp_path / "whole"
    small_model().save_pretrained(whole)
    for folder in (saved[1], whole):
        model = auto.from_pretrained(folder, attn_implementation=name)
        assert model.model.audio_tower.layers[0].self_attn.config._attn_implementation == encoder
        assert model.model.language_model.layers[0].self_attn.config._attn_implementation == text
        asked = name if isinstance(name, dict) else dict.fromkeys(("", "text_config", "audio_config"), name)
        said = {"": model.config, "text_config": model.config.text_config, "audio_config": model.config.audio_config}
        assert {part: said[part]._attn_implementation for part in asked} == asked


@pytest.mark.parametrize("keyword", ["trust_remote_code", "text_model", "load_in_4bit", "load_in_fp8", "whisper_cpu"])
def test_a_whole_model_takes_no_keyword_that_has_no_effect_on_it(tmp_path, keyword):
    small_model().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=rf"{keyword}.* has no effect") as refused:
        Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path, **{keyword: True})
    assert ("quantization_config=BitsAndBytesConfig(" in str(refused.value)) == (keyword == "load_in_4bit")


def test_a_folder_of_a_config_is_compared_as_well(saved, tmp_path):
    _, folder = saved
    other = Qwen3AudioConfig.from_pretrained(folder)
    other.audio_tail_silence = 2.0
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match=r"differs in audio_tail_silence"):
        Qwen3AudioForConditionalGeneration.from_pretrained(folder, config=str(tmp_path / "other"))


def test_another_base_is_refused_before_anything_is_loaded(saved, bases, tmp_path, monkeypatch):
    _, folder = saved
    other = tmp_path / "other"
    shutil.copytree(bases[1], other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(UsageError, match=r"--text_model .*other: .*trained on .*qwen3, which is another model"):
        load_trained(folder, text_model=str(other))
    config = Qwen3AudioConfig.from_pretrained(folder)
    config.text_base["name"] = str(other)
    config.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="was trained on another text base"):
        load_trained(folder)


def test_a_base_that_moved_is_found_where_it_is_said_to_be(saved, bases, tmp_path):
    model, folder = saved
    shutil.copytree(bases[1], tmp_path / "moved")
    config = Qwen3AudioConfig.from_pretrained(folder)
    config.text_base["name"] = str(tmp_path / "gone")
    config.save_pretrained(folder)
    with pytest.raises(UsageError, match=r"its text base was not found. Looked at .*gone \(no such folder\)"):
        load_trained(folder)
    again = Qwen3AudioForConditionalGeneration.from_pretrained(folder, text_model=str(tmp_path / "moved"))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("damage", ["gone", "shape", "lora"])
def test_weights_that_do_not_fit_are_a_checkpoint_error(saved, damage):
    _, folder = saved
    projector, adapter = folder / "projector.safetensors", folder / "adapter_model.safetensors"
    model = load_trained(folder)
    if damage == "gone":
        projector.unlink()
    elif damage == "shape":
        save_file(load_file(projector) | {"linear_1.weight": torch.zeros(2, 2)}, projector)
    else:
        tensors = load_file(adapter)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, adapter)
    with pytest.raises(CheckpointError, match=r"has no projector|do not fit this model"):
        load_trained_weights(model, folder)


@pytest.mark.parametrize(("fp32", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_lora_comes_back_in_the_dtype_that_it_was_trained_in(joined, tmp_path, fp32, dtype):
    model, _ = joined
    add_lora(model.to(torch.bfloat16), fp32=fp32)
    model.save_pretrained(tmp_path)
    again = load_trained(tmp_path, LoadOptions(dtype="bf16"))
    assert {p.dtype for _, p in lora_parameters(again)} == {dtype}


def test_an_encoder_that_was_trained_is_saved_even_by_a_model_that_keeps_it_frozen(joined, tmp_path):
    model, _ = joined
    model.model.audio_tower.requires_grad_(True)
    with torch.no_grad():
        model.model.audio_tower.conv1.weight.add_(1.0)
    model.save_pretrained(tmp_path / "one")
    again = load_trained(tmp_path / "one")
    assert not again.model.encoder_is_trained
    again.save_pretrained(tmp_path / "two")
    third = load_trained(tmp_path / "two")
    assert torch.equal(third.model.audio_tower.conv1.weight, model.model.audio_tower.conv1.weight)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2"])  # untied; tied; tied, with other names
def test_a_model_without_bases_is_saved_and_loaded_whole(family, tmp_path):
    model = small_model(family)
    tied = family != "qwen3"
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again, info = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(AutoModelForMultimodalLM.from_pretrained(tmp_path)), logits(model))


def test_a_whole_model_in_bf16_keeps_its_projector_in_fp32(tmp_path):
    small_model().save_pretrained(tmp_path)
    model = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.model.multi_modal_projector.parameters()} == {torch.float32}
    assert model.model.language_model.dtype == torch.bfloat16
    assert model.model.audio_tower.conv1.weight.dtype == torch.bfloat16


def test_a_whole_model_that_lacks_weights_is_refused(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.audio_tower.conv2.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"1 weights are missing .*conv2.weight"):
        Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path)


def test_the_whisper_decoder_is_never_loaded(bases, tmp_path):
    WhisperForConditionalGeneration(whisper_config()).save_pretrained(tmp_path)
    shutil.copy(Path(bases[0]) / "preprocessor_config.json", tmp_path)
    model, _ = build_from_bases(str(tmp_path), bases[1], LoadOptions(dtype="fp32"))
    assert not any("decoder" in name or "proj_out" in name for name, _ in model.named_parameters())
    whole = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.model.audio_tower.named_parameters():
        assert torch.equal(parameter.cpu(), whole[f"model.encoder.{name}"]), name


def test_weights_are_in_the_compute_dtype_and_the_projector_as_asked(bases):
    model, _ = build_from_bases(*bases, LoadOptions(dtype="bf16"))
    assert {p.dtype for p in model.model.language_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.model.audio_tower.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.model.multi_modal_projector.parameters()} == {torch.float32}
    model, _ = build_from_bases(*bases, LoadOptions(dtype=torch.bfloat16, projector_fp32=False))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {LoadOptions(dtype=name).compute_dtype for name in ("bf16", "bfloat16")} == {torch.bfloat16}
    with pytest.raises(UsageError, match="dtype 'half precision' is none of auto, bf16"):
        _ = LoadOptions(dtype="half precision").compute_dtype


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_a_device_map_and_the_encoder_on_the_cpu_give_the_same_model(bases, device_map):
    options = LoadOptions(dtype="fp32", device_map=device_map, whisper_cpu=True)
    model, _ = build_from_bases(*bases, options)
    plain, _ = build_from_bases(*bases, LoadOptions(dtype="fp32"))
    model.model.multi_modal_projector.load_state_dict(plain.model.multi_modal_projector.state_dict())
    assert model.model.audio_tower.device.type == "cpu"
    tensors = zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in tensors)
    found, expected = logits(model).cpu(), logits(plain).cpu()
    # Beside a GPU the encoder at least computes elsewhere, and two devices round differently.
    tolerance = 1e-5 if torch.cuda.is_available() else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_the_parts_share_the_models_configuration(joined):
    model, _ = joined
    assert model.config.text_config is model.model.language_model.config
    assert model.config.audio_config is model.model.audio_tower.config


def test_tied_embeddings_stay_one_tensor(joined):
    model, _ = joined
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


def test_bases_that_are_none_are_refused_by_name(bases, tmp_path):
    with pytest.raises(UsageError, match=r"--audio_model .*qwen3 is a qwen3 model; it takes any Whisper checkpoint"):
        build_from_bases(bases[1], bases[1])
    with pytest.raises(UsageError, match=r"--text_model .*: a folder without a usable config.json"):
        build_from_bases(bases[0], str(tmp_path))
    shutil.copytree(bases[1], tmp_path / "hollow")
    (tmp_path / "hollow" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="hollow has no weights"):
        build_from_bases(bases[0], str(tmp_path / "hollow"))


def text_base(folder: Path, config, bases) -> str:
    shutil.copytree(bases[1], folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def test_a_head_with_a_bias_is_kept_and_one_that_scales_is_refused(bases, tmp_path):
    shape = SHAPE | {"vocab_size": 300, "num_key_value_heads": 4}
    phi = text_base(tmp_path / "phi", PhiConfig(**shape), bases)
    model, _ = build_from_bases(bases[0], phi)
    with torch.no_grad():
        model.lm_head.bias.fill_(3.0)
    model.config.text_base = model.config.audio_base = None
    model.save_pretrained(tmp_path / "whole")
    again = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert again.lm_head.bias.tolist() == model.lm_head.bias.tolist()
    cohere = text_base(tmp_path / "cohere", CohereConfig(**shape, logit_scale=0.0625), bases)
    with pytest.raises(UsageError, match=r"--text_model .*cohere: its logits are more than lm_head"):
        build_from_bases(bases[0], cohere)


def test_a_language_model_that_lacks_weights_is_refused(bases, tmp_path):
    shutil.copytree(bases[1], tmp_path / "holes")
    tensors = load_file(tmp_path / "holes" / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"--text_model .*holes: 1 weights are missing .*up_proj"):
        build_from_bases(bases[0], str(tmp_path / "holes"))


def test_a_fingerprint_follows_the_weights_and_not_their_place(bases, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bases[1], copy)
    (copy / "notes.txt").write_text("not a weight")
    assert fingerprint(str(copy)) == fingerprint(bases[1])
    with (copy / "model.safetensors").open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        last = handle.read(1)
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last[0] ^ 1]))
    assert fingerprint(str(copy)) != fingerprint(bases[1])


def test_a_fingerprint_covers_every_shard(bases, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases[1])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    before = fingerprint(str(tmp_path))
    tensors = load_file(shards[1])
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, shards[1], metadata={"format": "pt"})
    assert fingerprint(str(tmp_path)) != before


def test_load_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoadOptions().dtype = "fp16"


@pytest.mark.parametrize("name", ["foo", "auto", "cuda:99", "xpu", "meta", ""])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name):
    for device_map in ({"": name}, name):
        if device_map != "auto":
            with pytest.raises(UsageError, match=rf"no device {name!r} for PyTorch here: give one of cpu"):
                LoadOptions(device_map=device_map)
    LoadOptions(device_map={"model.layers.0": name})  # such maps are transformers' to judge


def test_on_a_machine_with_two_gpus_those_are_taken_and_a_third_is_not(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for device, name in (("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), (torch.device("cuda:0"), "cuda:0")):
        assert (
            LoadOptions(device_map={"": device}).device == LoadOptions(device_map=device).device == torch.device(name)
        )
    with pytest.raises(UsageError, match="no device 'cuda:2' for PyTorch here: give one of cpu, cuda:0, cuda:1"):
        LoadOptions(device_map="cuda:2")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"": torch.device("cpu")}])
def test_a_device_map_of_one_device_is_the_encoders_too(monkeypatch, device_map):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = LoadOptions(device_map=device_map)
    assert options.device == options.encoder_device == torch.device("cpu")
    assert options.compute_dtype == torch.float32


@pytest.mark.parametrize("device_map", [None, "auto", {"model.layers.0": 0}])
def test_other_device_maps_leave_the_encoder_on_the_first_accelerator(monkeypatch, device_map):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert LoadOptions(device_map=device_map).encoder_device == torch.device("cuda")
    assert LoadOptions(device_map=device_map, whisper_cpu=True).encoder_device == torch.device("cpu")
