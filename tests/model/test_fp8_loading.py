"""A language model whose linears are kept in fp8: loaded, trained, saved and refused. On the CPU, where the fast
products run as well.
"""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from qwhisper.checksums import changed, checksums
from qwhisper.data.packing import pack_samples, pad_samples
from qwhisper.errors import UsageError
from qwhisper.guards.diagnose import bad_weight
from qwhisper.guards.gradients import frozen_parameters
from qwhisper.model import fp8, fp8_loading
from qwhisper.model.bases import LoadOptions
from qwhisper.model.fp8 import DEQUANTISED, FLOAT8, PRODUCTS, ROWWISE, dequantise, float8_layers, quantise_rows
from qwhisper.model.lora import LoraFloat8Linear, add_lora, lora_parameters
from qwhisper.model.qwen3_audio import build_from_bases, load_trained
from tests.model.parts import gradients, make_sample
from tests.small import write_small_bases

pytestmark = pytest.mark.usefixtures("rowwise_product")

FP8 = LoadOptions(load_in_fp8=True, dtype="fp32", device_map="cpu")
FULL = LoadOptions(dtype="fp32", device_map="cpu")


@pytest.fixture(scope="module")
def wide_bases(tmp_path_factory) -> tuple[str, str]:
    """Sizes that `_scaled_mm` takes."""
    audio, text = write_small_bases(tmp_path_factory.mktemp("wide"), hidden_size=64)
    return str(audio), str(text)


def built(bases, options=FP8):
    return build_from_bases(*bases, options, audio_lead_silence=0.0, audio_tail_silence=0.0)[0]


@pytest.fixture(scope="module")
def loaded(wide_bases):
    return built(wide_bases)


@pytest.fixture
def model(loaded):
    model = copy.deepcopy(loaded)
    add_lora(model)
    return model


def use(model, product: str) -> None:
    for layer in float8_layers(model).values():
        layer.product = product


def test_the_language_models_linears_are_in_fp8_and_nothing_else(model, wide_bases):
    layers = float8_layers(model)
    assert len(layers) == 14 and all(name.startswith("model.language_model.layers.") for name in layers)
    assert {layer.product for layer in layers.values()} == {DEQUANTISED}  # on the CPU
    assert {name.rpartition(".")[0] for name, p in model.named_parameters() if p.dtype == FLOAT8} == layers.keys()
    assert {p.dtype for p in model.parameters()} == {FLOAT8, torch.float32}
    assert {p.dtype for _, p in lora_parameters(model)} == {torch.float32}
    # fp8 has 253 numbers, to which PEFT would round A if it took the weight's dtype.
    assert all(len(p.unique()) > 300 for name, p in lora_parameters(model) if "lora_A" in name)
    adapted = {type(model.get_submodule(name.removesuffix(".base_layer"))) for name in layers}
    assert adapted == {LoraFloat8Linear} and type(model.lm_head) is nn.Linear
    full = built(wide_bases, FULL)
    for name, layer in layers.items():
        values, scales = quantise_rows(full.get_submodule(name.removesuffix(".base_layer")).weight.detach())
        assert torch.equal(dequantise(layer.weight, layer.weight_scale, torch.float32), values.float() * scales)


def test_the_kernel_is_chosen_once_the_model_is_loaded(wide_bases, monkeypatch):
    monkeypatch.setattr(fp8, "_capability", lambda device: (9, 0))
    assert {layer.product for layer in float8_layers(built(wide_bases)).values()} == {ROWWISE}


def test_loading_holds_one_matrix_at_a_time(wide_bases, monkeypatch):
    matrices: list[weakref.ref] = []
    alive = []

    def watched(matrix):
        gc.collect()
        alive.append(sum(reference() is not None for reference in matrices))
        matrices.append(weakref.ref(matrix))
        return quantise_rows(matrix)

    monkeypatch.setattr(fp8_loading, "quantise_rows", watched)
    built(wide_bases)
    assert len(alive) == 14 and max(alive) <= 1


def test_it_learns_and_its_base_stays(model):
    use(model, ROWWISE)
    batch = pack_samples([make_sample(model, [6, 5], [3000]), make_sample(model, [7], seed=1)])
    before = checksums(frozen_parameters(model))
    assert any(name.endswith("weight_scale") for name in before)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(**batch).loss
        loss.backward()
        assert all(torch.isfinite(grad).all() for grad in gradients(model).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert changed(before, checksums(frozen_parameters(model))) == []


def test_gradients_are_near_those_of_the_dequantised_weights(model):
    """The projector's gradient has passed every layer."""
    with torch.no_grad():
        for _, parameter in lora_parameters(model):
            parameter.normal_(0, 0.02)
    batch = pack_samples([make_sample(model, [6, 5], [3000])])
    found = {}
    for product in PRODUCTS:
        use(model, product)
        model.zero_grad(set_to_none=True)
        model.train()(**batch).loss.backward()
        found[product] = torch.cat([grad.flatten() for grad in gradients(model).values()])
    exact = found.pop(DEQUANTISED)
    for gradient in found.values():
        assert 0 < (gradient - exact).norm() < 0.1 * exact.norm()


def test_a_changed_bit_of_a_weight_or_a_scale_shows(model):
    before = checksums(frozen_parameters(model))
    name, layer = next(iter(float8_layers(model).items()))
    layer.weight.data.view(torch.uint8)[1, 2] ^= 1
    layer.weight_scale.data[3] *= 2
    assert changed(before, checksums(frozen_parameters(model))) == [f"{name}.weight", f"{name}.weight_scale"]


def test_a_weight_of_nan_is_named(model):
    assert bad_weight(model) is None
    name, layer = next(iter(float8_layers(model).items()))
    layer.weight.data.view(torch.uint8)[1, 2] = 0x7F
    finding = bad_weight(model)
    assert finding is not None and finding.where == f"{name}.weight"
    assert "float8_e4m3fn, 1 NaN and 0 Inf" in str(finding)


def test_trained_weights_reload_onto_an_fp8_and_onto_a_full_base(model, tmp_path):
    with torch.no_grad():
        for _, parameter in lora_parameters(model):
            parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 400_000
    assert "float8" not in (tmp_path / "config.json").read_text()
    row = pack_samples([make_sample(model, [6, 5], [3000])])
    row.pop("labels")
    with torch.no_grad():
        expected = model.eval()(**row).logits
        assert torch.equal(load_trained(tmp_path, FP8)(**row).logits, expected)
        full = load_trained(tmp_path, FULL)
        assert float8_layers(full) == {}
        assert torch.corrcoef(torch.stack([full(**row).logits.flatten(), expected.flatten()]))[0, 1] > 0.99


def test_saving_after_a_cast_still_knows_the_base(model, tmp_path):
    model.bfloat16().save_pretrained(tmp_path)
    assert (tmp_path / "projector.safetensors").exists()


@pytest.mark.slow
def test_a_layer_with_lora_compiles_whole(model):
    use(model, ROWWISE)
    layer = model.model.language_model.layers[0].mlp
    x = torch.randn(9, 64, requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    for run in (layer, compiled):
        y = run(x)
        found = [y, *torch.autograd.grad(y.sum(), trained)]
        if run is layer:
            expected = found
    assert len(found) == 8
    for got, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(got, eager)


def test_it_generates(model):
    use(model, ROWWISE)
    inputs = pad_samples([make_sample(model, [6, 5], [3000]), make_sample(model, [7])], 0, padding_side="left")
    output = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert output.shape == (2, inputs["input_ids"].shape[1] + 4)


def test_merging_is_refused_and_changes_nothing(model):
    name, layer = next(iter(float8_layers(model).items()))
    before = layer.weight.view(torch.uint8).clone()
    with pytest.raises(UsageError, match=r"merge\(\) can't change a layer in fp8"):
        model.get_submodule(name.removesuffix(".base_layer")).merge()
    assert torch.equal(layer.weight.view(torch.uint8), before)


def test_a_changed_base_can_t_be_saved_as_a_whole_model(model, tmp_path):
    next(iter(float8_layers(model).values())).weight_scale.data[0] *= 2
    with pytest.raises(UsageError, match="load it without load_in_4bit or load_in_fp8"):
        model.save_pretrained(tmp_path)


def test_both_formats_at_once_are_refused():
    with pytest.raises(UsageError, match="load_in_4bit and load_in_fp8 are two formats"):
        LoadOptions(load_in_4bit=True, load_in_fp8=True)
