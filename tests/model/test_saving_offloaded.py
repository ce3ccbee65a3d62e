"""A model with weights that accelerate keeps elsewhere is saved with their values."""

import weakref
from collections import Counter

import accelerate
import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from peft.tuners.lora import LoraLayer

from qwhisper import Qwen3AudioForConditionalGeneration
from qwhisper.checkpoint.names import PROJECTOR_FILE
from qwhisper.errors import UsageError
from qwhisper.model.lora import adapter_off, add_lora, lora_parameters
from qwhisper.model.weights import record_of
from tests.model.parts import TIED_ON_DISK, logits, lora, trained
from tests.model.test_placement import offloaded
from tests.small import small_model


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("way", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["trained weights alone", "the whole model"])
def test_an_offloaded_model_is_saved_with_its_weights(model, kind, way, tmp_path):
    """All of them, to the last bit, in the folder that is written if nothing is offloaded."""
    add_lora(model, r=4, alpha=8)
    for _, parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_1.weight)
    if kind == "the whole model":
        torch.nn.init.normal_(model.model.language_model.layers[0].mlp.up_proj.weight)
    expected = weights(model)
    model.save_pretrained(tmp_path / "plain")
    found = offloaded(model, way, tmp_path)
    assert all(parameter.is_meta for parameter in found.parameters())
    found.save_pretrained(tmp_path / "saved")
    files = {path.name: path.stat().st_size for path in (tmp_path / "saved").rglob("*")}
    assert files == {path.name: path.stat().st_size for path in (tmp_path / "plain").rglob("*")}
    assert (PROJECTOR_FILE in files) == (kind == "trained weights alone")
    again = weights(Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path / "saved"))
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("way", ["encoder", "projector", "language model"])
def test_a_model_that_was_loaded_offloaded_is_saved_with_its_weights(way, tmp_path):
    model = small_model()
    expected = weights(model)
    found = offloaded(model, way, tmp_path)
    for saved in (found, found.model):
        saved.save_pretrained(tmp_path / "again")
        again = type(saved).from_pretrained(tmp_path / "again").state_dict()
        prefix = "" if saved is found else "model."
        assert again and all(torch.equal(tensor, expected[prefix + name]) for name, tensor in again.items())


def test_a_base_on_the_disk_whose_weights_change_there_is_saved_whole(model, tmp_path):
    """The values decide whether a weight is still its base's, also if they are not in memory."""
    model.save_pretrained(tmp_path / "trained")
    stay = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    places = {f"model.language_model.{part}": "cpu" for part in stay}
    places |= {"model.audio_tower": "cpu", "model.language_model.layers.1": "disk", "lm_head": "cpu"}
    model = Qwen3AudioForConditionalGeneration.from_pretrained(
        tmp_path / "trained", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    norm = model.model.language_model.layers[1].input_layernorm
    assert norm.weight.is_meta
    norm._hf_hook.weights_map = {"weight": torch.full(norm.weight.shape, 2.0)}
    model.save_pretrained(tmp_path / "again")
    again = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.model.language_model.layers[1].input_layernorm.weight.eq(2.0).all()
    del norm._hf_hook.weights_map
    with pytest.raises(UsageError, match=r"1 weights are on the device meta.*layers\.1\.input_layernorm\.weight"):
        model.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_model_cast_while_it_is_offloaded_is_saved_as_it_computes(model, tmp_path):
    expected = weights(model)
    accelerate.cpu_offload(model, execution_device="cpu").bfloat16().save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / PROJECTOR_FILE).exists()
    again = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in again.items())


def merge(model, undo=False):
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.unmerge() if undo else layer.merge()


def run_offloaded(model, way, folder):
    if way != "loaded":
        return offloaded(model, way, folder)
    model.save_pretrained(folder / "run")
    places = {"model.audio_tower": "cpu", "model.language_model": "disk", "lm_head": "disk"}
    return type(model).from_pretrained(folder / "run", device_map=places, offload_folder=str(folder / "offload"))


@pytest.mark.parametrize(
    ("way", "family"),
    [
        ("cpu", "qwen3"),
        ("disk", "qwen3"),
        pytest.param("loaded", "qwen3", marks=TIED_ON_DISK),
        ("cpu", "gpt2"),  # its linears have another type
    ],
)
def test_an_offloaded_adapter_is_not_merged_and_not_lost(way, family, model, tmp_path):
    model = trained(model if family == "qwen3" else small_model(family))
    expected = logits(model)
    with adapter_off(model):
        assert not torch.allclose(logits(model), expected, atol=1e-2)
    found = run_offloaded(model, way, tmp_path)
    with pytest.raises(UsageError, match=r"merge\(\) can't change .* offloaded: load the model without offloading"):
        merge(found)
    torch.testing.assert_close(logits(found), expected)
    found.save_pretrained(tmp_path / "saved")
    again = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(again), expected)


@pytest.mark.filterwarnings("ignore:the adapter is merged")
def test_an_adapter_that_was_merged_before_offloading_is_in_the_weights(model, tmp_path):
    merge(trained(model))
    expected = logits(model)
    found = offloaded(model, "cpu", tmp_path)
    with pytest.raises(UsageError, match=r"unmerge\(\) can't change"):
        merge(found, undo=True)
    found.save_pretrained(tmp_path / "saved")
    again = Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert not hasattr(again, "peft_config") and torch.equal(logits(again), expected)


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_a_merge_by_peft_that_changed_no_weight_is_not_believed(model, way, tmp_path):
    lora(model, target_modules=r"model\.language_model\..*q_proj")
    found = offloaded(model, way, tmp_path)
    merge(found)
    with pytest.raises(UsageError, match=r"q_proj says that it is merged.* without offloading and merge it there"):
        found.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("part", ["whole", "trained", "without a head"])
def test_weights_without_values_are_refused_before_a_folder_is_made(model, part, tmp_path):
    empty = (model.model if part == "without a head" else model).to("meta")
    if part == "whole":
        model.base_record = None
    with pytest.raises(UsageError, match=r"weights are on the device meta, which holds no values \(.*\): load"):
        empty.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class Reads:
    """How often each weight on the disk is read, by its name in the file, and the most bytes of them held at once."""

    def __init__(self, monkeypatch):
        self.counts, self.held, self.peak = Counter(), 0, 0
        read = OffloadedWeightsLoader.__getitem__

        def counted(loader, key):
            tensor = read(loader, key)
            self.counts[loader.index[key]["weight_name"]] += 1
            self.held += tensor.nbytes
            self.peak = max(self.peak, self.held)
            weakref.finalize(tensor, self.release, tensor.nbytes)
            return tensor

        monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)

    def release(self, size):
        self.held -= size


@pytest.fixture
def on_disk(bases, model, tmp_path):
    """Trained weights whose language model, with a tied head, is on the disk."""
    add_lora(model, r=4, alpha=8)
    model.save_pretrained(tmp_path / "trained")
    places = {"": "cpu", "model.language_model": "disk", "lm_head": "disk"}
    found = Qwen3AudioForConditionalGeneration.from_pretrained(
        tmp_path / "trained", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert found.config.tie_word_embeddings and found.lm_head.weight.is_meta
    return found


@TIED_ON_DISK
@pytest.mark.parametrize("use", ["record", "save", "cast"])
def test_weights_on_the_disk_are_compared_one_at_a_time_and_tied_ones_once(on_disk, use, tmp_path, monkeypatch):
    language_model = on_disk.model.language_model
    expected = {name for name, p in language_model.named_parameters() if p.is_meta}
    largest = language_model.embed_tokens.weight.nbytes
    reads = Reads(monkeypatch)
    if use == "record":
        assert record_of(on_disk) == on_disk.base_record
    elif use == "save":
        on_disk.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / PROJECTOR_FILE).exists()
    else:
        assert on_disk.half().model.language_model.norm.weight.dtype == torch.half
    assert len(reads.counts) == len(expected)
    assert set(reads.counts.values()) == {2 if use == "cast" else 1}  # before and after
    assert reads.peak == largest and reads.held == 0


@TIED_ON_DISK
def test_a_whole_model_on_the_disk_is_saved_with_each_weight_read_once(on_disk, tmp_path, monkeypatch):
    on_disk.base_record = None
    reads = Reads(monkeypatch)
    on_disk.save_pretrained(tmp_path / "saved")
    assert set(reads.counts.values()) == {1} and "model.embed_tokens.weight" in reads.counts
