from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config

from qwhisper import Qwen3AudioConfig, Qwen3AudioForConditionalGeneration
from qwhisper.data.packing import pack_samples, pad_samples
from qwhisper.model import attention
from qwhisper.model.attention import attention_for, packed_attention_forward
from qwhisper.model.lora import add_lora
from tests.model.parts import gradients, make_sample
from tests.small import SHAPE, SLIDING_WINDOW, VOCABULARY, large_weights, small_model, text_config, whisper_config

FAMILIES = ["qwen3", "gemma3", "gpt2"]  # grouped-query heads; sliding window; learned positions and no grouped heads
_MODELS: dict = {}


def trainable_model(family: str):
    """LoRA with B away from zero, so that every adapter has a gradient; made once a family."""
    if family not in _MODELS:
        torch.manual_seed(0)
        model = small_model(family)
        add_lora(model)
        large_weights(model.model.language_model)
        _MODELS[family] = model.train()
    return _MODELS[family]


def loss_and_gradients(model, batch: dict):
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


@contextmanager
def sdpa_calls():
    """The set of (math, flash, memory-efficient) switches that torch's attention was called under."""
    seen, plain = set(), torch.nn.functional.scaled_dot_product_attention
    cuda = torch.backends.cuda

    def spy(*args, **keywords):
        seen.add((cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()))
        return plain(*args, **keywords)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        yield seen


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_row_equals_padded_batch_in_loss_and_gradients(family):
    model = trainable_model(family)

    @settings(deadline=None, max_examples=10)
    @given(st.lists(st.lists(st.integers(2, 2 * SLIDING_WINDOW), min_size=1, max_size=3), min_size=1, max_size=4))
    def check(text_lengths):
        samples = [
            make_sample(model, lengths, [400 + 1500 * i for i in range(len(lengths) - 1)], seed=i)
            for i, lengths in enumerate(text_lengths)
        ]
        packed_loss, packed = loss_and_gradients(model, pack_samples(samples))
        padded_loss, padded = loss_and_gradients(model, pad_samples(samples, pad_token_id=0))
        torch.testing.assert_close(packed_loss, padded_loss, atol=1e-5, rtol=1e-5)
        assert packed.keys() == padded.keys()
        for name, grad in packed.items():
            torch.testing.assert_close(grad, padded[name], atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")

    check()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_samples_of_a_packed_row_do_not_see_each_other(family):
    model = trainable_model(family)
    first, second = make_sample(model, [9, 5], [3000], seed=1), make_sample(model, [12], seed=2)
    row = pack_samples([first, second])
    del row["labels"]
    before = model(**row).logits
    row["input_ids"][0, 2] += 1
    after = model(**row).logits
    length = len(first.input_ids)
    assert not torch.allclose(before[:, 2:length], after[:, 2:length], atol=1e-3)
    assert torch.equal(before[:, length:], after[:, length:])


@torch.no_grad()
def test_the_sliding_window_is_honoured_in_a_packed_row():
    model = trainable_model("gemma3")
    row = pack_samples([make_sample(model, [3 * SLIDING_WINDOW])])
    del row["labels"]
    windowed = model(**row).logits
    module = next(m for m in model.modules() if getattr(m, "sliding_window", None) == SLIDING_WINDOW)
    module.sliding_window = None
    unwindowed = model(**row).logits
    module.sliding_window = SLIDING_WINDOW
    assert torch.equal(windowed[:, :SLIDING_WINDOW], unwindowed[:, :SLIDING_WINDOW])
    assert (windowed - unwindowed).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_ordinary_path_equals_transformers_eager_attention(family):
    model = trainable_model(family)
    batch = pad_samples([make_sample(model, [20]), make_sample(model, [7, 9], [2000])], pad_token_id=0)
    del batch["labels"]
    ours = model(**batch).logits
    model.model.language_model.set_attn_implementation("eager")
    eager = model(**batch).logits
    model.model.language_model.set_attn_implementation(attention.PACKED_ATTENTION)
    shown = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[shown], eager[shown], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_left_padded_generation_equals_each_prompt_alone(family, num_beams):
    model = trainable_model(family).eval()
    prompts = [
        make_sample(model, [5, 4], [4000], seed=3),
        make_sample(model, [21], seed=4),
        make_sample(model, [3, 2, 2], [900, 2500]),
    ]
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": num_beams,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    together = model.generate(**pad_samples(prompts, pad_token_id=0, padding_side="left"), **settings)
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(**pad_samples([prompt], pad_token_id=0, padding_side="left"), **settings)
        assert row[-6:].tolist() == alone[0, -6:].tolist()
    model.train()


def test_packed_rows_need_our_attention():
    model = trainable_model("qwen3")
    model.model.language_model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="packed rows need attn_implementation='qwhisper_packed', not 'sdpa'"):
        model(**pack_samples([make_sample(model, [5])]))
    model.model.language_model.set_attn_implementation(attention.PACKED_ATTENTION)


@pytest.mark.parametrize("extra", [{"softcap": 50.0}, {"s_aux": torch.zeros(2)}])
def test_what_our_attention_would_leave_out_is_refused(extra):
    heads = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="knows neither soft-capping nor sinks"):
        packed_attention_forward(
            torch.nn.Module(), heads, heads, heads, None, cu_seq_lens_q=torch.tensor([0, 4]), max_length_q=4, **extra
        )


@torch.no_grad()
def test_a_language_model_with_soft_capped_scores_runs_in_eager_attention():
    capped = Gemma2Config(**SHAPE, attn_logit_softcapping=1.0, query_pre_attn_scalar=8)
    assert attention_for(capped) == "eager"
    assert attention_for(text_config("gemma3")) == attention.PACKED_ATTENTION
    config = Qwen3AudioConfig(audio_config=whisper_config(), text_config=capped, audio_token_id=VOCABULARY - 1)
    model = Qwen3AudioForConditionalGeneration(config).eval()
    large_weights(model)
    inputs = pad_samples([make_sample(model, [9])], pad_token_id=0, padding_side="left")
    before = model(**inputs).logits
    for module in model.modules():
        if getattr(module, "attn_logit_softcapping", None):
            module.attn_logit_softcapping = 100.0
    assert not torch.allclose(model(**inputs).logits, before, atol=1e-4)


def test_grouped_heads_are_told_to_a_varlen_that_asks(monkeypatch):
    def asks(query, *, enable_gqa=False): ...
    def repeats_by_itself(query): ...

    for varlen, groups, expected in [(asks, 2, {"enable_gqa": True}), (asks, 1, {}), (repeats_by_itself, 2, {})]:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
        assert attention.varlen_keywords(groups) == expected


def test_cudnn_attention_is_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_of_a_ladder_gives_the_same_loss_and_gradients(family):
    model = trainable_model(family)
    samples = [make_sample(model, [3 * SLIDING_WINDOW]), make_sample(model, [4, 5], [2000], seed=1)]
    batches = [pack_samples(samples), pad_samples(samples, pad_token_id=0)]
    expected = [loss_and_gradients(model, batch) for batch in batches]
    try:
        attention.replace_kernel("sdpa_per_segment")
        attention.replace_kernel("sdpa")
        with sdpa_calls() as backends:
            found = [loss_and_gradients(model, batch) for batch in batches]
    finally:
        attention.restore_kernels()
    assert backends == {(True, False, False)}
    for (loss, grads), (right_loss, right_grads) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, right_loss, atol=1e-6, rtol=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, right_grads[name], atol=2e-5, rtol=1e-3)


def test_kernels_are_replaced_down_their_ladder_and_the_last_one_stays():
    try:
        query = torch.empty(0, 64)
        assert attention.packed_kernel(query) == "sdpa_per_segment"  # varlen does not run here
        assert attention.replace_kernel("sdpa_per_segment") == "math_per_segment"
        assert attention.replace_kernel("varlen") == "math_per_segment"
        assert attention.replace_kernel("math_per_segment") is None
        assert attention.packed_kernel(query) == "math_per_segment" and attention.padded_kernel() == "sdpa"
        assert attention.replace_kernel("sdpa") == "math" and attention.replace_kernel("math") is None
        assert attention.padded_kernel() == "math"
    finally:
        attention.restore_kernels()
    assert attention.packed_kernel(query) == "sdpa_per_segment" and attention.padded_kernel() == "sdpa"


def test_packed_rows_on_cuda_prefer_varlen(monkeypatch):
    monkeypatch.setattr(attention, "varlen_can_run", lambda query, dropout: dropout == 0)
    query = torch.empty(0, 64)
    assert attention.packed_kernel(query) == "varlen" and attention.packed_kernel(query, 0.1) == "sdpa_per_segment"
