"""No weight is lost on saving: what differs from its base is written with the whole model, or refused by name."""

import shutil

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForMultimodalLM, GenerationConfig

from qwhisper import Qwen3AudioForConditionalGeneration
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.infer.assistant import Assistant
from qwhisper.model.bases import LoadOptions
from qwhisper.model.loading import load_trained_weights
from qwhisper.model.lora import add_lora
from qwhisper.model.offloaded import full_state
from qwhisper.model.qwen3_audio import build_from_bases, load_trained
from qwhisper.model.weights import differing, plain_weights
from tests.model.parts import TRAINED, WHOLE, kind, logits, reloaded, step, trained
from tests.small import small_model, write_small_bases

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_a_frozen_base_is_not_written(model, tmp_path):
    step(model)
    reloaded(model, tmp_path, TRAINED)


@pytest.mark.parametrize(
    ("part", "with_lora"),
    [("layers.1.mlp", False), pytest.param("", False, marks=pytest.mark.slow), ("embed_tokens", True)],
)
def test_a_language_model_that_was_trained_is_saved_whole_without_its_base(joined, bases, tmp_path, part, with_lora):
    shutil.copytree(bases[1], tmp_path / "text")
    model, _ = build_from_bases(bases[0], str(tmp_path / "text"))
    if with_lora:
        add_lora(model)
        step(model)  # B is no longer zero
    for name, parameter in model.model.language_model.get_submodule(part).named_parameters():
        parameter.requires_grad_("base_layer" not in name)
    step(model)
    shutil.rmtree(tmp_path / "text")
    again = reloaded(model, tmp_path / "saved", WHOLE)
    assert again.config.text_base is again.config.audio_base is None
    assert model.config.text_base is not None
    assert {n for n, _ in again.named_parameters() if "lora_" in n} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(AutoModelForMultimodalLM.from_pretrained(tmp_path / "twice")), logits(model))


@pytest.mark.filterwarnings("ignore:.*holds a whole model")
def test_a_run_goes_on_from_a_whole_model_with_what_it_trains(model, bases, tmp_path):
    add_lora(model)
    model.model.audio_tower.requires_grad_(True).double()
    step(model.double())
    write_embedding(model)
    model.save_pretrained(tmp_path)
    again = load_trained(tmp_path, LoadOptions(dtype="fp32"), text_model=bases[1], audio_model=bases[0])
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad and "audio_tower" not in name}
    torch.testing.assert_close(logits(again), logits(model.float()))
    again.model.audio_tower.double()
    load_trained_weights(again, tmp_path)
    rounded = again.model.audio_tower.conv1.weight.float().double()
    assert not torch.equal(again.model.audio_tower.conv1.weight, rounded)
    with pytest.raises(UsageError, match="whole model, which is not loaded in 4 bits"):
        load_trained(tmp_path, LoadOptions(load_in_4bit=True))
    with pytest.raises(UsageError, match="not loaded in fp8: leave load_in_fp8 out"):
        load_trained(tmp_path, LoadOptions(load_in_fp8=True))


def write_embedding(model):
    model.get_input_embeddings().weight.data[7] += 1


def swap_rows(model):
    rows = model.get_input_embeddings().weight
    with torch.no_grad():
        rows[[5, 9]] = rows[[9, 5]]


def replace_head(model):
    model.lm_head = nn.Linear(32, model.lm_head.out_features, bias=False)


def append_zero_rows(model):
    weight = model.get_input_embeddings().weight
    model.resize_token_embeddings(len(weight) + 8)
    model.get_input_embeddings().weight.data[-8:] = 0


@pytest.mark.parametrize("change", [swap_rows, replace_head, append_zero_rows])
def test_any_other_change_of_content_is_saved(model, tmp_path, change):
    change(model)
    again = reloaded(model, tmp_path, WHOLE)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == (change is not replace_head)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_buffer_of_a_base_that_changed_is_seen(model, tmp_path):
    model.model.language_model.register_buffer("shift", torch.ones(2))
    with pytest.raises(UsageError, match=r"1 weights have no place .*model.language_model.shift"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("where", ["", "model.audio_tower", "model.multi_modal_projector"])
def test_a_module_that_loading_would_not_build_is_refused_by_name(model, tmp_path, where):
    model.get_submodule(where).register_module("extra", nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"2 weights have no place .*extra.weight"):
        model.save_pretrained(tmp_path)


def test_an_encoder_whose_last_layer_alone_was_trained_is_saved_and_gets_its_gradients(model, tmp_path):
    encoder = model.model.audio_tower
    encoder.layers[-1].requires_grad_(True)
    step(model)
    again = reloaded(model, tmp_path, TRAINED)
    assert torch.equal(again.model.audio_tower.layers[-1].fc1.weight, encoder.layers[-1].fc1.weight)
    reloaded(again, tmp_path / "twice", TRAINED)


def test_an_encoder_that_was_written_to_while_frozen_is_saved(model, tmp_path):
    model.model.audio_tower.layers[0].fc1.weight.data += 0.1
    reloaded(model, tmp_path, TRAINED)
    assert (tmp_path / "encoder.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_is_no_change(model, tmp_path, dtype):
    add_lora(model.to(dtype))
    model.save_pretrained(tmp_path)
    assert kind(tmp_path) == TRAINED
    again = load_trained(tmp_path, LoadOptions(dtype=dtype))
    assert torch.equal(again.model.language_model.norm.weight, model.model.language_model.norm.weight)


def test_a_part_that_was_cast_to_a_wider_dtype_is_no_change_until_it_is_written_to(bases, tmp_path):
    model, _ = build_from_bases(*bases, LoadOptions(dtype="bf16"))
    layer = model.model.language_model.layers[0].float()
    model.save_pretrained(tmp_path)
    assert kind(tmp_path) == TRAINED
    layer.mlp.up_proj.weight.data[0, 0] += 1e-6
    model.save_pretrained(tmp_path)
    assert kind(tmp_path) == WHOLE


def test_what_was_changed_before_a_cast_is_still_known_after_it(model):
    write_embedding(model)
    model.half()
    names = differing(model.base_record, plain_weights(full_state(model)))
    assert names == ["model.language_model.embed_tokens.weight", "lm_head.weight"]


def test_a_given_state_dict_is_what_is_saved(model, tmp_path):
    given = {name: tensor.clone() for name, tensor in model.state_dict().items() if "multi_modal_projector" in name}
    given["model.multi_modal_projector.linear_1.weight"] += 1
    model.save_pretrained(tmp_path, state_dict=given)
    saved = load_file(tmp_path / TRAINED)
    assert torch.equal(saved["linear_1.weight"], given["model.multi_modal_projector.linear_1.weight"])
    trained_head = {"model.language_model.norm.weight": torch.full((32,), 2.0)}
    model.save_pretrained(tmp_path, state_dict=trained_head)
    assert kind(tmp_path) == WHOLE
    assert load_file(tmp_path / WHOLE)["model.language_model.norm.weight"].tolist() == [2.0] * 32
    with pytest.raises(UsageError, match=r"state_dict has 1 weights that this model lacks, the first: norm"):
        model.save_pretrained(tmp_path, state_dict={"norm": torch.ones(1)})


def test_another_process_writes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"variant": "fp16"}, "variant='fp16': trained weights are saved under fixed names"),
        ({"max_shard_size": "1KB"}, r"max_shard_size='1KB': projector.safetensors is one file of"),
        ({"safe_serialization": False}, "does not take safe_serialization"),
        ({"save_peft_format": False}, "does not take save_peft_format"),
        ({"distributed_checkpoint": True}, "does not take distributed_checkpoint"),
        ({"repo_id": "a/b"}, "does not take repo_id here: .* with push_to_hub=True repo_id"),
        ({"adapters_only": True, "push_to_hub": True}, "does not take adapters_only"),
    ],
)
def test_a_keyword_acts_or_is_refused(model, tmp_path, keywords, message):
    with pytest.raises(UsageError, match=message):
        model.save_pretrained(tmp_path, **keywords)
    assert not list(tmp_path.iterdir())


def test_a_whole_model_takes_the_librarys_keywords(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp32", safe_serialization=True)
    assert len(list(tmp_path.glob("model.fp32-*-of-*.safetensors"))) > 1
    again = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path, variant="fp32")
    assert torch.equal(logits(again), logits(model))


def test_the_folder_is_no_file_and_no_base(model, bases, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(UsageError, match=r"qwen3 holds a base of this model"):
        model.save_pretrained(bases[1])


@pytest.mark.parametrize("first", ["adapter and encoder", "whole with adapter"])
def test_nothing_of_an_earlier_save_is_loaded_with_a_later_one(joined, bases, tmp_path, first):
    earlier = trained(build_from_bases(*bases)[0])
    earlier.model.audio_tower.requires_grad_(True)
    if first == "whole with adapter":
        write_embedding(earlier)
    earlier.save_pretrained(tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == (3 if first == "adapter and encoder" else 2)
    model, _ = joined
    reloaded(model, tmp_path, TRAINED)
    assert sorted(file.name for file in tmp_path.rglob("*.safetensors")) == [TRAINED]


class Hub:
    """What reaches huggingface_hub, in place of the network."""

    def __init__(self, patch):
        self.files, self.calls = [], []
        patch.setattr(HfApi, "create_repo", self.create_repo)
        patch.setattr(HfApi, "create_commit", self.create_commit)

    def create_repo(self, repo_id, **keywords):
        self.calls.append(("create_repo", repo_id, keywords))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def create_commit(self, **keywords):
        self.calls.append(("create_commit", keywords["repo_id"], keywords))
        self.files += sorted(operation.path_in_repo for operation in keywords["operations"])


@pytest.mark.parametrize("change", [None, write_embedding])
def test_push_to_hub_uploads_what_was_written(model, tmp_path, monkeypatch, change):
    hub = Hub(monkeypatch)
    add_lora(model)
    if change:
        change(model)
    tmp_path.joinpath("old.txt").write_text("not part of it")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="heard", token="t", private=True, commit_message="Hello")
    expected = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} - {"old.txt"}
    assert set(hub.files) == expected and len(expected) == 6
    (create, commit) = hub.calls
    assert create == ("create_repo", "heard", {"private": True, "token": "t", "exist_ok": True})
    assert commit[1] == "me/heard"
    assert (commit[2]["token"], commit[2]["commit_message"]) == ("t", "Hello")
    hub.files.clear()
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert hub.calls[-2][1] == "mine" and len(hub.files) == 6


def test_without_a_network_the_weights_are_at_least_in_the_folder(model, tmp_path, monkeypatch):
    def offline(*args, **keywords):
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "create_repo", offline)
    with pytest.raises(ConnectionError):
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="heard")
    assert kind(tmp_path) == TRAINED


def test_a_4_bit_model_whose_base_changed_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    audio, text = write_small_bases(tmp_path / "wide", hidden_size=64)
    model, _ = build_from_bases(str(audio), str(text), LoadOptions(load_in_4bit=True, dtype="fp32", device_map="cpu"))
    step(model)
    logits(model)  # evaluation mode lays nothing out anew
    model.save_pretrained(tmp_path / "one")
    assert kind(tmp_path / "one") == TRAINED
    model.model.language_model.norm.weight.data += 1
    with pytest.raises(UsageError, match=r"a quantised model .*norm.weight.* can't be saved: load it without"):
        model.save_pretrained(tmp_path / "two")


def test_a_whole_model_answers_as_any_checkpoint(joined, tmp_path):
    model, processor = joined
    write_embedding(model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = Assistant.from_pretrained(tmp_path, "cpu", "fp32").model
    assert torch.equal(logits(again), logits(model))


def test_generation_settings_come_back(model, tmp_path):
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 7
    assert Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path).generation_config.max_new_tokens == 7
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config.json can't be read"):
        Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path)
