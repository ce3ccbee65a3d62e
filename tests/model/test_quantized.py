"""NF4 through bitsandbytes, whose CPU kernels make all of it testable without a GPU."""

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from qwhisper.data.packing import pack_samples, pad_samples
from qwhisper.errors import UsageError
from qwhisper.model.bases import LoadOptions, load_language_model
from qwhisper.model.lora import LoraLayer, LoraLinear, add_lora, lora_parameters
from qwhisper.model.qwen3_audio import build_from_bases, load_trained
from tests.model.parts import gradients, make_sample
from tests.small import write_small_bases

bitsandbytes = pytest.importorskip("bitsandbytes")
from qwhisper.model.four_bit import Linear4bit  # noqa: E402

# On the CPU also where there is a GPU: its kernels are what the bit-exact comparisons below are about.
FOUR_BIT = LoadOptions(load_in_4bit=True, dtype="fp32", device_map="cpu")
FULL = LoadOptions(dtype="fp32", device_map="cpu")


@pytest.fixture(scope="module")
def wide_bases(tmp_path_factory) -> tuple[str, str]:
    """NF4 has blocks of 64 weights: wide enough that every linear is made of whole ones."""
    audio, text = write_small_bases(tmp_path_factory.mktemp("wide"), hidden_size=64)
    return str(audio), str(text)


def build(bases: tuple[str, str], options: LoadOptions):
    torch.manual_seed(0)
    model, _ = build_from_bases(*bases, options, audio_lead_silence=0.0, audio_tail_silence=0.0)
    add_lora(model)
    return model


@pytest.fixture
def model(wide_bases):
    return build(wide_bases, FOUR_BIT)


@pytest.fixture(scope="module")
def prequantised(wide_bases, tmp_path_factory) -> tuple[str, str]:
    """The same bases, the language model saved in 4 bits."""
    audio, text = wide_bases
    folder = str(tmp_path_factory.mktemp("nf4"))
    load_language_model(text, FOUR_BIT).save_pretrained(folder)
    AutoTokenizer.from_pretrained(text).save_pretrained(folder)
    return audio, folder


def four_bit_names(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def test_the_language_models_linears_are_in_4_bit_and_nothing_else(model):
    names = four_bit_names(model)
    assert len(names) == 14
    assert all(name.startswith("model.language_model.layers.") for name in names)
    adapted = [model.get_submodule(name.removesuffix(".base_layer")) for name in names]
    assert {type(module).forward for module in adapted} == {LoraLinear.forward}
    assert type(model.lm_head) is nn.Linear
    assert {p.dtype for p in model.model.audio_tower.parameters()} == {torch.float32}
    assert {p.dtype for p in model.model.multi_modal_projector.parameters()} == {torch.float32}
    assert {p.dtype for _, p in lora_parameters(model)} == {torch.float32}


def test_it_learns_and_its_base_stays(model):
    batch = pack_samples([make_sample(model, [6, 5], [3000]), make_sample(model, [7], seed=1)])
    weights = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
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
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


def test_gradients_are_the_same_after_a_pass_in_evaluation_mode(model):
    """On CPUs with AVX512-BF16 bitsandbytes would repack the weights in it, and pass no gradient on from then on."""
    batch = pack_samples([make_sample(model, [6, 5], [3000])])
    model.train()(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.eval()(**batch)
    model.train()(**batch).loss.backward()
    assert gradients(model).keys() == expected.keys()
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(model).items())
    assert gradients(model)["model.multi_modal_projector.linear_1.weight"].abs().sum() > 0


def test_4_bit_is_near_the_full_model(model, wide_bases):
    torch.manual_seed(0)
    full, _ = build_from_bases(*wide_bases, FULL, audio_lead_silence=0.0, audio_tail_silence=0.0)
    full.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
    row = pack_samples([make_sample(model, [12])])
    row.pop("labels")
    with torch.no_grad():
        exact, rough = full(**row).logits.flatten(), model(**row).logits.flatten()
    assert not torch.equal(exact, rough)
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.95


def test_trained_weights_reload_onto_a_4_bit_and_onto_a_full_base(model, tmp_path):
    with torch.no_grad():
        for _, parameter in lora_parameters(model):
            parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 400_000
    row = pack_samples([make_sample(model, [6, 5], [3000])])
    row.pop("labels")
    with torch.no_grad():
        expected = model.eval()(**row).logits
        assert torch.equal(load_trained(tmp_path, FOUR_BIT)(**row).logits, expected)
        full = load_trained(tmp_path, FULL)(**row).logits
    assert four_bit_names(load_trained(tmp_path, FULL)) == []
    assert torch.corrcoef(torch.stack([full.flatten(), expected.flatten()]))[0, 1] > 0.95


def test_it_generates(model):
    inputs = pad_samples([make_sample(model, [6, 5], [3000]), make_sample(model, [7])], 0, padding_side="left")
    output = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert output.shape == (2, inputs["input_ids"].shape[1] + 4)


def logits_of(model) -> torch.Tensor:
    row = pack_samples([make_sample(model, [6, 5], [3000])])
    row.pop("labels")
    with torch.no_grad():
        return model.eval()(**row).logits


@pytest.mark.parametrize("options", [FULL, FOUR_BIT], ids=["as it is", "load_in_4bit"])
def test_a_base_saved_in_4_bits_is_the_one_that_is_quantised_during_loading(model, prequantised, options):
    saved = build(prequantised, options)
    assert four_bit_names(saved) == four_bit_names(model)
    assert {type(saved.get_submodule(name)) for name in four_bit_names(saved)} == {Linear4bit}
    batch = pack_samples([make_sample(model, [6, 5], [3000])])
    for each in (model, saved):
        each.train()(**batch).loss.backward()
    expected, found = gradients(model), gradients(saved)
    assert expected.keys() == found.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())
    assert torch.equal(logits_of(saved), logits_of(model))


@pytest.mark.slow
def test_trained_weights_reload_onto_a_base_saved_in_4_bits(prequantised, tmp_path):
    model = build(prequantised, FULL)
    with torch.no_grad():
        for _, parameter in lora_parameters(model):
            parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    for options in (FULL, FOUR_BIT):
        assert torch.equal(logits_of(load_trained(tmp_path, options)), logits_of(model))


def test_a_base_saved_in_4_bits_is_computed_in_the_dtype_of_the_run(prequantised):
    model = load_language_model(prequantised[1], LoadOptions(dtype="bf16", device_map="cpu"))
    linear = model.get_submodule("model.layers.0.mlp.down_proj")
    assert linear.compute_dtype == model.model.norm.weight.dtype == torch.bfloat16
    assert linear.weight.quant_state.state2.absmax.dtype == torch.float32


def test_merged_into_a_base_saved_in_4_bits_can_not_be_saved(prequantised, tmp_path):
    model = build(prequantised, FULL)
    with torch.no_grad():
        for _, parameter in lora_parameters(model):
            parameter.normal_(0, 0.1)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    with pytest.raises(UsageError, match="can't be saved: train on its base in full"):
        model.save_pretrained(tmp_path / "merged")


def test_a_head_in_4_bits_is_refused(wide_bases, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    head_too = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["none"])
    whole = AutoModelForCausalLM.from_pretrained(wide_bases[1], tie_word_embeddings=False)
    whole.save_pretrained(tmp_path / "untied")
    keywords = {"quantization_config": head_too, "device_map": "cpu"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "untied", **keywords).save_pretrained(tmp_path / "nf4")
    with pytest.raises(UsageError, match=r"its head \(lm_head\) is quantised too"):
        load_language_model(str(tmp_path / "nf4"), FULL)


def test_without_bitsandbytes_a_base_saved_in_4_bits_names_the_extra(prequantised, monkeypatch):
    monkeypatch.setattr("qwhisper.versions._installed", lambda name: None if name == "bitsandbytes" else "99")
    with pytest.raises(UsageError, match=r"4 bits .* needs bitsandbytes.*pip install 'qwhisper\[quant\]'"):
        load_language_model(prequantised[1], FULL)
