"""NF4 through bitsandbytes, whose CPU kernels make all of it testable without a GPU."""

import pytest
import torch
from torch import nn

from qwhisper.data.packing import pack_samples, pad_samples
from qwhisper.model.bases import LoadOptions
from qwhisper.model.lora import LoraLinear, add_lora, lora_parameters
from qwhisper.model.qwen3_audio import build_from_bases, load_trained
from tests.model.parts import gradients, make_sample
from tests.small import write_small_bases

bitsandbytes = pytest.importorskip("bitsandbytes")
# On the CPU also where there is a GPU: its kernels are what the bit-exact comparisons below are about.
FOUR_BIT = LoadOptions(load_in_4bit=True, dtype="fp32", device_map="cpu")
FULL = LoadOptions(dtype="fp32", device_map="cpu")


@pytest.fixture(scope="module")
def wide_bases(tmp_path_factory) -> tuple[str, str]:
    """NF4 has blocks of 64 weights: wide enough that every linear is made of whole ones."""
    audio, text = write_small_bases(tmp_path_factory.mktemp("wide"), hidden_size=64)
    return str(audio), str(text)


@pytest.fixture
def model(wide_bases):
    model, _ = build_from_bases(*wide_bases, FOUR_BIT, audio_lead_silence=0.0, audio_tail_silence=0.0)
    add_lora(model)
    return model


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
