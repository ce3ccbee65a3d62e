"""Memory by part: what is counted, against real tensors and against measured peaks."""

import pytest
import torch

from qwhisper.data.row_sizes import Rows
from qwhisper.engine.plan_memory import GIB, Job, largest_temporary, memory_of, pack_of, saved_per_token, usable
from qwhisper.engine.plan_sizes import AUDIO_SIZES, TEXT_SIZES, audio_size, text_size
from qwhisper.model.lora import add_lora
from tests.small import small_model

ENCODER = AUDIO_SIZES["whisper-large-v3-turbo"]
ROWS = Rows()


def job(size: str, **values) -> Job:
    return Job(text=TEXT_SIZES[f"qwen3-{size}"], audio=ENCODER, **values)


def reserved(of: Job, tokens: int, recompute_layers: int = 0) -> float:
    return memory_of(of, pack_of(ROWS, tokens), recompute_layers).reserved / GIB


# Peaks of `max_memory_reserved` in GiB, torch 2.11, H200 or H100: (job, tokens of the largest pack, layers computed
# again, lowest and highest measured). The data are those of benchmarks/throughput.py.
MEASURED = {
    "0.6b, 128 samples a step": (job("0.6b"), 8192, 0, 17.3, 17.94),
    "0.6b, 4 samples a step": (job("0.6b"), 1247, 0, 5.3, 6.64),
    "8b, 4 samples a step": (job("8b"), 1158, 0, 26.2, 26.2),
    "8b, 8 samples a step": (job("8b"), 2059, 0, 31.5, 31.5),
    "8b, 32 samples a step, all layers computed again": (job("8b"), 7727, 36, 21.4, 21.4),
    "0.6b, projector alone, with a teacher": (job("0.6b", lora_r=0, distils=True), 8192, 0, 14.7, 14.7),
}


@pytest.mark.parametrize("case", MEASURED)
def test_the_plan_is_within_ten_percent_of_the_measured_peak(case):
    of, tokens, again, lowest, highest = MEASURED[case]
    assert 0.9 * lowest <= reserved(of, tokens, again) <= 1.1 * highest


def test_a_compiled_layer_of_8b_keeps_what_was_measured():
    """189 MiB at 2048 tokens."""
    assert saved_per_token(job("8b", execution="compiled")) * 2048 / 2**20 == pytest.approx(189, abs=0.5)


@pytest.mark.parametrize("values", [{}, {"weights": "nf4"}, {"lora_r": 0}, {"whisper_cpu": True}, {"distils": True}])
def test_parts_add_up_and_grow_with_tokens_and_shrink_with_layers_computed_again(values):
    of = job("8b", **values)
    memories = {(n, r): memory_of(of, pack_of(ROWS, n), r) for n in (256, 1024, 8192) for r in (0, 1, 18, 36)}
    for memory in memories.values():
        assert sum(memory.parts.values()) == memory.reserved < memory.on_card
        assert min(memory.parts.values()) >= 0
    for again in (0, 1, 18, 36):
        sizes = [memories[n, again].reserved for n in (256, 1024, 8192)]
        assert sizes == sorted(sizes) and len(set(sizes)) == 3
    for tokens in (1024, 8192):
        sizes = [memories[tokens, r].reserved for r in (0, 1, 18, 36)]
        assert sizes == sorted(sizes, reverse=True)


def test_weights_and_what_is_trained_are_counted_as_they_are_kept():
    model = small_model()
    add_lora(model, r=4)
    config = model.config
    of = Job(
        text=text_size(config.get_text_config()), audio=audio_size(config.audio_config), weights="fp32", dtype="fp32",
        lora_r=4, projector_stack=config.projector_stack,
    )  # fmt: skip
    parts = memory_of(of, pack_of(ROWS, 1000), 0).parts
    body = model.model
    lora = sum(p.numel() for n, p in body.named_parameters() if "lora_" in n)
    head = 0 if of.text.tied else model.lm_head.weight.numel()
    language_model = sum(p.numel() for n, p in body.language_model.named_parameters() if "lora_" not in n) + head
    assert parts["language model"] == 4 * language_model
    assert parts["LoRA, gradients, moments"] == 16 * lora == 16 * of.lora_parameters
    assert parts["projector, gradients, moments"] == 16 * sum(
        p.numel() for p in body.multi_modal_projector.parameters()
    )


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], ["down_proj"], []])
def test_what_a_layer_keeps_for_the_backward_pass_is_what_autograd_saves(targets):
    """Of two models that differ in one layer, in bf16: the bytes that one saves and the other does not, to the byte but
    for the factors of A and B, which don't depend on tokens.
    """
    tokens = 512
    one, two = (saved_bytes(layers, tokens, targets) for layers in (1, 2))
    size = text_size(small_model().config.get_text_config())
    rank = 0 if targets == [] else 4
    of = Job(text=size, audio=ENCODER, lora_r=rank, lora_targets=tuple(targets) if targets else None)
    assert two - one == tokens * saved_per_token(of)


def saved_bytes(layers: int, tokens: int, targets: list[str] | None) -> int:
    """What a language model with so many layers saves for its backward pass, without weights."""
    model = small_model().to(torch.bfloat16)
    body = model.model.language_model
    del body.layers[layers:]
    body.config.num_hidden_layers = layers
    if targets != []:
        add_lora(model, r=4, target_modules=targets)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        if tokens in tensor.shape and storage.data_ptr() not in owned:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    embeddings = torch.randn(1, tokens, body.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        body.train()(inputs_embeds=embeddings, use_cache=False)
    return sum(found.values())


def test_graphs_leave_evaluations_memory_beside_them_and_compiled_layers_keep_less():
    plain, compiled, captured = (
        memory_of(job("8b", execution=execution), pack_of(ROWS, 2048), 0).parts
        for execution in ("plain", "compiled", "captured")
    )
    assert captured.pop("evaluations beside graphs") > 0 and captured == compiled
    for name in ("activations", "logits and other temporaries"):
        assert compiled[name] < plain[name]
    assert compiled["language model"] == plain["language model"]


def test_an_nf4_layer_that_is_computed_again_keeps_all_its_dequantised_weights():
    of = job("32b", weights="nf4")
    none, one = (largest_temporary(of, pack_of(ROWS, 1159), again) for again in (0, 1))
    projections = 2 * 5120 * 64 * 128 + 2 * 5120 * 8 * 128
    gradients = 1159 * (3 * 25600 + 2 * 5120)
    assert one == 2 * (gradients + projections + 3 * 5120 * 25600) > none  # bf16
    fp8 = job("32b", weights="fp8")
    assert largest_temporary(fp8, pack_of(ROWS, 1159), 1) == largest_temporary(fp8, pack_of(ROWS, 1159), 0) == none


def test_layers_computed_again_with_dropout_run_plain():
    plain, captured, dropout = (
        [memory_of(job("8b", **values), pack_of(ROWS, 2048), again).reserved for again in (0, 1, 36)]
        for values in ({}, {"execution": "captured"}, {"execution": "captured", "dropout": True})
    )
    assert dropout == [captured[0], *plain[1:]] and not set(plain) & set(captured)


def test_a_card_of_32_gib_has_room_for_30():
    assert usable(32) / GIB == pytest.approx(30.2, abs=0.1)
    assert usable(24) < usable(32)
