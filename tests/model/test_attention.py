import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Gemma2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwhisper import Qwen3AudioConfig, Qwen3AudioForConditionalGeneration
from qwhisper.data.packing import pack_samples, pad_samples
from qwhisper.model import attention
from qwhisper.model.attention import attention_for, packed_attention_forward
from qwhisper.model.lora import add_lora
from tests.model.parts import gradients, make_sample
from tests.model.test_modeling import WAYS
from tests.sdpa_switches import switches, switches_of_calls
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


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_row_equals_padded_batch_in_loss_and_gradients(family):
    model = trainable_model(family)

    @settings(deadline=None, max_examples=6)
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


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@torch.no_grad()
def test_a_row_packed_by_positions_alone_equals_padded_rows(name):
    """transformers' other form of a packed row, for any attention: without borders and without a cache."""
    model = small_model()
    model.set_attn_implementation(name)
    samples = [
        make_sample(model, [9, 5], [3000], seed=1),
        make_sample(model, [12], seed=2),
        make_sample(model, [4], []),
    ]
    packed, padded = pack_samples(samples), pad_samples(samples, pad_token_id=0, padding_side="left")
    for key in ("labels", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        del packed[key]
    mask = padded["attention_mask"].bool()
    padded["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    alone = model(**packed, use_cache=False).logits[0]
    torch.testing.assert_close(model(**padded, use_cache=False).logits[mask], alone, atol=1e-5, rtol=1e-4)


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
    model = small_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="packed rows need attn_implementation='qwhisper_packed', not 'eager'"):
        model(**pack_samples([make_sample(model, [5])]))


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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_implementation_gives_the_same_loss_and_gradients(family):
    model = trainable_model(family)
    samples = [make_sample(model, [3 * SLIDING_WINDOW]), make_sample(model, [4, 5], [2000], seed=1)]
    batches = [pack_samples(samples), pad_samples(samples, pad_token_id=0)]
    expected = [loss_and_gradients(model, batch) for batch in batches]
    try:
        for name in attention.IMPLEMENTATIONS:
            model.set_attn_implementation(name)
            for batch, (right_loss, right_grads) in zip(batches, expected, strict=True):
                loss, grads = loss_and_gradients(model, batch)
                torch.testing.assert_close(loss, right_loss, atol=1e-6, rtol=1e-6)
                for parameter, grad in grads.items():
                    torch.testing.assert_close(grad, right_grads[parameter], atol=2e-5, rtol=1e-3)
    finally:
        model.set_attn_implementation(attention.PACKED_ATTENTION)


def test_an_implementation_names_a_kernel_for_each_kind_of_row():
    query = torch.empty(0, 64)
    chosen = {
        name: (attention.packed_kernel(name, query, has_blocks=True), kernels.padded)
        for name, kernels in attention.IMPLEMENTATIONS.items()
    }
    assert chosen == {  # neither segments nor varlen runs here
        "qwhisper_packed": ("sdpa_per_segment", "sdpa"),
        "qwhisper_packed_padded_math": ("sdpa_per_segment", "math"),
        "qwhisper_packed_varlen": ("sdpa_per_segment", "sdpa"),
        "qwhisper_packed_varlen_padded_math": ("sdpa_per_segment", "math"),
        "qwhisper_packed_sdpa": ("sdpa_per_segment", "sdpa"),
        "qwhisper_packed_sdpa_padded_math": ("sdpa_per_segment", "math"),
        "qwhisper_packed_math": ("math_per_segment", "sdpa"),
        "qwhisper_packed_math_padded_math": ("math_per_segment", "math"),
    }


def test_a_wrong_kernel_is_followed_by_the_next_of_its_table():
    kernels = ("segments", "varlen", "sdpa_per_segment", "math_per_segment", "sdpa", "math")
    following = [attention.next_kernel(name) for name in kernels]
    assert following == ["varlen", "sdpa_per_segment", "math_per_segment", None, "math", None]
    assert attention.with_kernel("qwhisper_packed_padded_math", "varlen") == "qwhisper_packed_varlen_padded_math"
    assert attention.with_kernel("qwhisper_packed", "sdpa_per_segment") == "qwhisper_packed_sdpa"
    assert attention.with_kernel("qwhisper_packed_sdpa", "math") == "qwhisper_packed_sdpa_padded_math"
    assert (
        attention.with_kernel("qwhisper_packed_padded_math", "math_per_segment") == "qwhisper_packed_math_padded_math"
    )


@pytest.mark.parametrize("has_blocks", [False, True])
def test_packed_rows_on_cuda_prefer_varlen(has_blocks, monkeypatch):
    monkeypatch.setattr(attention, "varlen_can_run", lambda query, dropout: dropout == 0)
    query = torch.empty(0, 64)
    assert attention.packed_kernel("qwhisper_packed", query, has_blocks=has_blocks) == "varlen"
    assert attention.packed_kernel("qwhisper_packed", query, 0.1, has_blocks=has_blocks) == "sdpa_per_segment"
    assert attention.packed_kernel("qwhisper_packed_sdpa", query, has_blocks=has_blocks) == "sdpa_per_segment"


def test_packed_rows_with_a_table_of_blocks_prefer_the_kernel_that_reads_it(monkeypatch):
    monkeypatch.setattr(attention, "varlen_can_run", lambda query, dropout: True)
    monkeypatch.setattr(attention, "segments_can_run", lambda query, dropout: dropout == 0)
    query = torch.empty(0, 64)
    assert attention.packed_kernel("qwhisper_packed", query, has_blocks=True) == "segments"
    assert attention.packed_kernel("qwhisper_packed", query, has_blocks=False) == "varlen"
    assert attention.packed_kernel("qwhisper_packed", query, 0.1, has_blocks=True) == "varlen"
    assert attention.packed_kernel("qwhisper_packed_varlen", query, has_blocks=True) == "varlen"


@pytest.mark.parametrize("family", FAMILIES)
def test_borders_on_the_host_spare_the_kernels_a_look_at_the_device(family, monkeypatch):
    model = trainable_model(family)
    batch = pack_samples([make_sample(model, [9]), make_sample(model, [4, 5], [2000], seed=1)])
    right_loss, right_grads = loss_and_gradients(model, batch)
    on_host = batch["cu_seq_lens_q"].tolist()
    batch["cu_seq_lens_q"] = torch.full_like(batch["cu_seq_lens_q"], -1)  # were it read, the result would be another
    loss, grads = loss_and_gradients(model, batch | {"cu_seq_lens_host": on_host})
    assert torch.equal(loss, right_loss) and all(torch.equal(grads[name], grad) for name, grad in right_grads.items())


# torch's switches of SDPA's backends


def heads() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 6, 8, generator=generator) for _ in range(3)]


class Causal(torch.nn.Module):
    is_causal, num_key_value_groups = True, 1


CAUSAL = Causal()


def attend(implementation: str, query, key, value, **keywords) -> torch.Tensor:
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    return function(CAUSAL, query, key, value, None, scaling=0.3, **keywords)[0]


PACKED_ROW = {"cu_seq_lens_q": torch.tensor([0, 4, 6]), "max_length_q": 4}


@pytest.mark.parametrize("keywords", [{}, PACKED_ROW], ids=["padded", "packed"])
def test_a_call_leaves_out_cudnn_and_the_switches_as_they_were(keywords):
    for name, kernels in attention.IMPLEMENTATIONS.items():
        before = switches()
        with switches_of_calls() as seen:
            attend(name, *heads(), **keywords)
        math_alone = (kernels.packed if keywords else kernels.padded).startswith("math")
        others = {"flash": not math_alone, "mem_efficient": not math_alone, "math": True}
        assert seen and all(one == {"cudnn": False, **others} for one in seen), name
        assert switches() == before
    assert before["cudnn"]


def test_what_else_the_process_switched_off_stays_off():
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]), switches_of_calls() as seen:
        attend("qwhisper_packed", *heads())
        assert switches()["cudnn"] and not switches()["flash"]
    assert seen == [{"cudnn": False, "flash": False, "mem_efficient": False, "math": True}]


def test_switches_come_back_after_a_call_that_fails():
    query, key, value = heads()
    for name in ("qwhisper_packed", "qwhisper_packed_math_padded_math"):
        for keywords in ({}, PACKED_ROW):
            with pytest.raises(RuntimeError):
                attend(name, query, key[..., :3], value, **keywords)
    assert all(switches().values())


def test_threads_don_t_switch_cudnn_on_for_each_other():
    def calls() -> None:
        for _ in range(300):
            attend("qwhisper_packed", *inputs)

    inputs, interval = heads(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with switches_of_calls() as seen, ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(calls) for _ in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert len(seen) == 1200 and not any(one["cudnn"] for one in seen)
    assert all(switches().values())


def test_compiled_attention_is_one_graph_and_leaves_out_cudnn():
    seen = []

    class Runs(torch.fx.Interpreter):
        """The graph node by node, as AOTAutograd's tracing does, where backends are chosen."""

        def call_function(self, target, args, kwargs):
            if "scaled_dot_product_attention" in str(target):
                seen.append(switches())
            return super().call_function(target, args, kwargs)

    compiled = torch.compile(attend, fullgraph=True, backend=lambda graph, _: Runs(graph).run)
    for name in ("qwhisper_packed", "qwhisper_packed_math_padded_math"):
        for keywords in ({}, PACKED_ROW | {"cu_seq_lens_host": [0, 4, 6]}):
            torch.testing.assert_close(compiled(name, *heads(), **keywords), attend(name, *heads(), **keywords))
    assert len(seen) == 6 and not any(one["cudnn"] for one in seen)
    assert all(switches().values())


def set_and_run(model, name, way):
    WAYS[way](model, name)
    model(input_ids=torch.arange(5)[None])  # a configuration is read here


def load_with(model, name, folder):
    model.save_pretrained(folder)
    type(model).from_pretrained(folder, attn_implementation=name)


FLEX = {way: partial(set_and_run, way=way) for way in WAYS} | {
    "language model": lambda model, name: model.model.language_model.set_attn_implementation(name),
    "encoder": lambda model, name: model.model.audio_tower.set_attn_implementation(name),
}


@pytest.mark.parametrize("way", [*FLEX, "loading", "loading, by part"])
def test_flex_attention_is_refused_on_the_whole_and_on_each_part(way, tmp_path):
    """On a CPU it has no backward pass."""
    model, name = small_model(), {"text_config": "flex_attention"} if way == "loading, by part" else "flex_attention"
    with pytest.raises(ValueError, match="does not support an attention implementation through torch's flex_attention"):
        FLEX.get(way, partial(load_with, folder=tmp_path))(model, name)
    assert type(model.model.language_model)._supports_flex_attn  # another model of this class may use it
