"""Keywords of transformers' `from_pretrained` act on trained weights and on whole models, or are refused and why."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, BitsAndBytesConfig, PreTrainedModel

from qwhisper import Qwen3AudioConfig, Qwen3AudioForConditionalGeneration, Qwen3AudioModel
from qwhisper.checkpoint.manifest import write_manifest
from qwhisper.errors import UsageError
from qwhisper.model import device_map
from tests.model.parts import TIED_ON_DISK, logits, trained
from tests.small import small_model

pytestmark = pytest.mark.usefixtures("on_the_cpu")
load = Qwen3AudioForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def folders(joined_once, tmp_path_factory):
    """{"trained", "whole"}: a folder of trained weights over bases, and one of a whole model."""
    folder = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    trained(copy.deepcopy(joined_once()[0])).save_pretrained(folder / "trained")
    small_model().save_pretrained(folder / "whole")
    return {name: folder / name for name in ("trained", "whole")}


BOTH = pytest.mark.parametrize("kind", ["trained", "whole"])


@BOTH
@pytest.mark.parametrize(
    "keywords",
    [
        {"revision": "main", "token": "hf_x", "force_download": True, "proxies": {}},
        {"cache_dir": "cache", "local_files_only": True},
        {"low_cpu_mem_usage": True, "use_safetensors": True, "weights_only": True, "ignore_mismatched_sizes": False},
        {"device_map": "auto", "max_memory": {"cpu": "1GB"}, "offload_folder": "off", "offload_buffers": True},
    ],
)
def test_what_does_not_change_a_local_model_is_taken(folders, kind, keywords, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load(folders[kind], **keywords)), logits(load(folders[kind])))


@BOTH
@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
def test_dtype_also_by_its_deprecated_name(folders, kind):
    for keywords in ({"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}):
        model = load(folders[kind], **keywords)
        assert model.model.language_model.dtype == model.model.audio_tower.dtype == torch.bfloat16
        assert model.model.multi_modal_projector.linear_1.weight.dtype == torch.float32


@BOTH
def test_a_report_of_loading_names_nothing_that_is_missing(folders, kind):
    for cls in (Qwen3AudioForConditionalGeneration, Qwen3AudioModel, AutoModelForMultimodalLM):
        model, info = cls.from_pretrained(folders[kind], output_loading_info=True)
        assert type(model).__name__ == (cls if cls is Qwen3AudioModel else Qwen3AudioForConditionalGeneration).__name__
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@BOTH
def test_a_subfolder_of_a_local_folder(folders, kind):
    assert torch.equal(logits(load(folders[kind].parent, subfolder=kind)), logits(load(folders[kind])))
    with pytest.raises(UsageError, match="missing: no such folder"):
        load(folders[kind], subfolder="missing")


@BOTH
def test_a_run_is_loaded_as_its_checkpoint_is(folders, kind, tmp_path):
    checkpoint = shutil.copytree(folders[kind], tmp_path / "run" / "checkpoint-1")
    (checkpoint / "state.json").write_text("{}")
    write_manifest(checkpoint, 1, True)
    models = [load(name, dtype="float32") for name in (tmp_path / "run", checkpoint)]
    assert torch.equal(*map(logits, models))
    trainable = [{name for name, weight in model.named_parameters() if weight.requires_grad} for model in models]
    assert trainable[0] == trainable[1] != set()


LAYERS = "model.language_model"
SPLIT = {
    "model.audio_tower": "cpu", "model.multi_modal_projector": "cpu", f"{LAYERS}.embed_tokens": "cpu", "lm_head": "cpu",
    f"{LAYERS}.norm": "cpu", f"{LAYERS}.rotary_emb": "cpu", f"{LAYERS}.layers.0": "cpu", f"{LAYERS}.layers.1": "disk",
}  # fmt: skip
OF_LANGUAGE_MODEL = {key.replace(LAYERS, "model"): place for key, place in SPLIT.items() if key[:8] != "model.mu"}


@pytest.mark.parametrize(
    ("kind", "device_map"), [("trained", SPLIT), ("trained", OF_LANGUAGE_MODEL), ("whole", SPLIT)], ids=str
)
def test_a_layer_that_stays_on_the_disk_computes_the_same(folders, kind, device_map, tmp_path):
    """LoRA's matrices beside it hold the trained values, not what memory held before."""
    model = load(folders[kind], device_map=device_map, offload_folder=tmp_path / "off")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert not any(p.is_meta for name, p in model.named_parameters() if "lora_" in name)
    assert torch.equal(logits(model), logits(load(folders[kind])))
    if kind == "trained":
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.fixture(scope="module")
def tied(folders):
    """The same folders, and in both models the head is the embeddings."""
    model = load(folders["trained"])
    model.base_record = None
    model.save_pretrained(folders["whole"].parent / "tied")
    return folders | {"whole": folders["whole"].parent / "tied"}


ON_DISK = {"model.audio_tower": "cpu", "model.multi_modal_projector": "cpu", LAYERS: "disk", "lm_head": "disk"}


@TIED_ON_DISK
@pytest.mark.parametrize("device_map", [{"": "disk"}, ON_DISK], ids=["all", "parts"])
@pytest.mark.filterwarnings("ignore:.*stay in memory")
@BOTH
def test_a_language_model_that_stays_on_the_disk_computes_the_same(tied, kind, device_map, tmp_path):
    """Its head is its embeddings. The encoder and the projector of trained weights stay in memory."""
    model = load(tied[kind], device_map=device_map, offload_folder=tmp_path / "off")
    assert model.config.tie_word_embeddings and model.lm_head.weight.is_meta
    of_text = {name: parameter for name, parameter in model.named_parameters() if name.startswith(LAYERS)}
    assert all(parameter.is_meta != ("lora_" in name) for name, parameter in of_text.items())
    assert torch.equal(logits(model), logits(load(tied[kind])))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(tied[kind])))


PARTS = {"model.audio_tower": "cpu", "model.multi_modal_projector": "cpu"}
# Map: how many of the language model's weights stay on the disk.
MAPS = {
    "a layer in a part of the map": (PARTS | {LAYERS: "cpu", f"{LAYERS}.layers.1": "disk", "lm_head": "cpu"}, 11),
    "a layer in the whole map": ({"": "cpu", f"{LAYERS}.layers.1": "disk"}, 11),
    "a layer in the model": ({"model": "cpu", f"{LAYERS}.layers.1": "disk", "lm_head": "cpu"}, 11),
    "a device in a part on the disk": (PARTS | {LAYERS: "disk", f"{LAYERS}.norm": "cpu"}, 23),
    "the encoder in a map on the disk": ({"": "disk", **PARTS}, 24),
    "a tied head that has no place": (PARTS | {LAYERS: "disk"}, 24),
    "the encoder alone": ({"model.audio_tower": "cpu"}, 0),
    "names without the head's model": ({"audio_tower": "cpu", "language_model.layers": "disk"}, 22),
    "names in the causal LM": ({"model.layers": "disk", "model.embed_tokens": "cpu"}, 22),
}


@TIED_ON_DISK
@pytest.mark.parametrize("case", MAPS)
@BOTH
def test_each_weight_goes_where_the_longest_name_in_a_map_says(tied, kind, case, tmp_path):
    device_map, expected = MAPS[case]
    model = load(tied[kind], device_map=device_map, offload_folder=tmp_path / "off")
    on_disk = [name for name, p in model.named_parameters() if p.is_meta and name != "lm_head.weight"]
    assert len(on_disk) == expected and all(name.startswith(LAYERS) for name in on_disk)
    assert torch.equal(logits(model), logits(load(tied[kind])))


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (
            {LAYERS: "disk", "lm_head": "cpu"},
            r"lm_head \(cpu\) and model\.\S*embed_tokens \(disk\) are one weight in this",
        ),
        (
            {LAYERS: "cpu", "lm_head": "disk"},
            r"lm_head \(disk\) and model\.\S*embed_tokens \(cpu\) are one weight in this",
        ),
        ({"": "disk", "lm_head": "cpu"}, r"lm_head \(cpu\) and model\.\S*embed_tokens \(disk\) are one weight in this"),
        ({f"{LAYERS}.embed_tokens": "disk", "": "cpu"}, r"lm_head \(cpu\) and model\.\S*embed_tokens \(disk\) are one"),
        ({LAYERS: "cuda:99", "lm_head": "cpu"}, r"there is no device 'cuda:99' for PyTorch here: give one of cpu"),
        ({"": None}, r"there is no device 'None' for PyTorch here"),
        (
            {"model.audio_towr": "cpu"},
            r"'model.audio_towr' is no part of this model: name its modules, such as model\.",
        ),
        (
            {f"{LAYERS}.layers.0.mlp.up_proj.bias": "cpu", LAYERS: "disk"},
            r"'model.language_model.layers.0.mlp.up_proj.bias' is no part",
        ),
    ],
    ids=str,
)
@BOTH
def test_a_device_map_that_cannot_be_carried_out_is_refused_with_its_reason(
    tied, kind, places, said, tmp_path, monkeypatch
):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)  # refused before anything is loaded
    rest = {} if "" in places else {"model.audio_tower": "cpu", "model.multi_modal_projector": "cpu"}
    with pytest.raises(UsageError, match=said):
        load(tied[kind], device_map=rest | places, offload_folder=tmp_path)


def test_weights_that_are_used_together_have_one_place(folders, tmp_path):
    places = {"": "cpu", "model.audio_tower.conv1.bias": "disk"}
    with pytest.raises(
        UsageError, match=r"conv1.weight \(cpu\) and \S*conv1.bias \(disk\) .*: give model.audio_tower.conv1 "
    ):
        load(folders["whole"], device_map=places, offload_folder=tmp_path)


def test_a_model_without_its_head_has_the_same_rule(model, tmp_path):
    body = Qwen3AudioModel(model.config)
    body.save_pretrained(tmp_path / "body")
    places = {"": "cpu", "language_model": "disk", "language_model.norm": "cpu"}
    found = Qwen3AudioModel.from_pretrained(tmp_path / "body", device_map=places, offload_folder=tmp_path / "off")
    on_disk = {name for name, parameter in found.named_parameters() if parameter.is_meta}
    assert on_disk == {f"language_model.{n}" for n, _ in body.language_model.named_parameters() if n != "norm.weight"}
    found.save_pretrained(tmp_path / "again")
    again = Qwen3AudioModel.from_pretrained(tmp_path / "again").state_dict()
    assert again and all(torch.equal(tensor, again[name]) for name, tensor in body.state_dict().items())
    for refused in ({"": "cuda:99"}, "cuda:99", {"language_model.norms": "cpu"}):
        with pytest.raises(UsageError, match=r"no device 'cuda:99'|'language_model.norms' is no part of this model"):
            Qwen3AudioModel.from_pretrained(tmp_path / "body", device_map=refused)


def test_what_a_loader_says_of_a_device_map_is_not_taken_for_a_missing_model(folders, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("Some modules are on the disk.\nPass a custom `device_map`.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UsageError, match=r"its language model can't be placed as device_map says \(Some modules are"):
        load(folders["trained"])


@pytest.mark.parametrize("part", ["model.audio_tower", "model.audio_tower.layers.0", "model.multi_modal_projector"])
def test_encoder_and_projector_of_trained_weights_stay_in_memory_with_a_warning(folders, part, tmp_path):
    with pytest.warns(UserWarning, match=rf"device_map: {part}\.\S+ \(disk\): .* of trained weights stay in memory"):
        model = load(folders["trained"], device_map=SPLIT | {part: "disk"}, offload_folder=tmp_path)
    assert not any(p.is_meta for name, p in model.named_parameters() if not name.startswith(LAYERS))
    assert torch.equal(logits(model), logits(load(folders["trained"])))


def test_the_encoder_of_trained_weights_goes_to_one_device(folders, monkeypatch):
    monkeypatch.setattr(device_map, "refuse_missing_devices", lambda places: None)
    with pytest.raises(
        UsageError, match=r"conv1 \(cpu\) and \S*layers.0.\S* \(cuda:1\): give the encoder .* one device"
    ):
        load(folders["trained"], device_map={"": "cpu", "model.audio_tower.layers.0": "cuda:1"})


def four_bit(model) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


@BOTH
def test_a_quantisation_is_of_the_language_models_layers_alone(folders, kind):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["audio_tower"])
    for given in (config, {"load_in_4bit": True, "quant_method": "bitsandbytes"}):
        model = load(folders[kind], quantization_config=given)
        assert four_bit(model) and all(name.startswith(LAYERS) for name in four_bit(model))
        found, full = logits(model), logits(load(folders[kind]))
        assert not torch.equal(found, full) and (found - full).norm() < full.norm()
    assert config.llm_int8_skip_modules == ["audio_tower"]


@BOTH
def test_gradients_pass_through_4_bit_weights_after_an_evaluation(folders, kind, monkeypatch):
    """On a CPU with AVX-512 BF16, bitsandbytes would repack the weights in the evaluation, if their sizes allow it."""
    monkeypatch.setattr(pytest.importorskip("bitsandbytes").nn.modules, "has_avx512bf16", lambda: True)
    model = load(folders[kind], quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    found = logits(model)
    embeddings = model.get_input_embeddings()
    embeddings.weight.requires_grad_(True)
    trained = model.train()(input_ids=torch.arange(4)[None], attention_mask=torch.ones(1, 4)).logits
    trained.sum().backward()
    assert embeddings.weight.grad.abs().sum() > 0 and torch.equal(logits(model.eval()), found)


def test_trained_weights_are_loaded_in_4_bits_or_in_full(folders):
    with pytest.raises(UsageError, match=r"in 4 bits or in full. Give quantization_config=BitsAndBytesConfig\(load_in"):
        load(folders["trained"], quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"ignore_mismatched_sizes": True}, r"ignore_mismatched_sizes \(a trained weight of another shape is an error"),
        ({"variant": "fp16"}, r"variant \(its files have fixed names"),
        ({"state_dict": {}}, r"state_dict \(load the model, then call"),
        ({"max_new_tokens": 5}, r"max_new_tokens \(give it to generate"),
        ({"temperature": 0.5}, r"temperature \(give it to generate"),
        ({"projector_scale": 2.0}, r"projector_scale \(trained weights have their own config"),
        ({"use_safetensors": False}, r"use_safetensors \(its weights are safetensors"),
        ({"load_in_8bit": True}, r"load_in_8bit \(give load_in_4bit=True"),
        ({"tp_plan": "auto", "key_mapping": {}}, r"key_mapping \(.*\), tp_plan \(the model is loaded by one process"),
    ],
)
def test_what_trained_weights_do_not_take_is_refused_with_the_reason(folders, keywords, reason):
    with pytest.raises(UsageError, match=reason):
        load(folders["trained"], **keywords)


def test_weights_of_another_shape_are_drawn_anew_only_if_that_is_asked_for(folders):
    config = Qwen3AudioConfig.from_pretrained(folders["whole"])
    config.projector_stack = 2
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folders["whole"], config=config)
    model, info = load(folders["whole"], config=config, ignore_mismatched_sizes=True, output_loading_info=True)
    names = {str(key[0]) for key in info["mismatched_keys"]}
    assert "model.multi_modal_projector.linear_1.weight" in names and not any(LAYERS in name for name in names)
    assert torch.isfinite(logits(model)).all()


def in_cache(cache: Path, repository: str, folder: Path, revision: str) -> None:
    """Put a folder where the hub's client puts a download."""
    place = cache / f"models--{repository.replace('/', '--')}"
    commit = f"{len(revision):040x}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / revision).write_text(commit)


def test_trained_weights_on_the_hub_and_their_bases_come_from_where_the_keywords_say(
    folders, bases, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # transformers asks for an adapter's file in any case
    ears, cache = tmp_path / "ears", tmp_path / "cache"
    shutil.copytree(folders["trained"], ears)
    config = Qwen3AudioConfig.from_pretrained(ears)
    config.audio_base["name"], config.text_base["name"] = "somebody/whisper", "somebody/qwen3"
    config.save_pretrained(ears)
    in_cache(cache, "me/ears", ears, "v2")
    in_cache(cache, "somebody/whisper", Path(bases[0]), "main")
    in_cache(cache, "somebody/qwen3", Path(bases[1]), "main")
    there = {"cache_dir": str(cache), "local_files_only": True, "token": False}
    model = load("me/ears", revision="v2", **there)
    assert torch.equal(logits(model), logits(load(folders["trained"])))
    assert model.config.text_base["name"] == "somebody/qwen3"
    with pytest.raises(OSError, match="find them in the cached files"):
        load("me/ears", **there)  # its main revision is not in the cache


def test_a_model_without_its_head_may_be_loaded_with_a_new_projector(model, tmp_path):
    body = Qwen3AudioModel(model.config)
    body.save_pretrained(tmp_path)
    config = Qwen3AudioConfig.from_pretrained(tmp_path)
    config.projector_stack += 1
    found = Qwen3AudioModel.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    assert found.multi_modal_projector.norm.weight.shape != body.multi_modal_projector.norm.weight.shape


def test_a_model_without_its_head_is_not_saved_with_an_adapter(folders, tmp_path):
    body = Qwen3AudioModel.from_pretrained(folders["trained"])
    assert type(body) is Qwen3AudioModel
    with pytest.raises(UsageError, match=r"adapter, and no head: save the Qwen3AudioForConditionalGeneration"):
        body.save_pretrained(tmp_path)
