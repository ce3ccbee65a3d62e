"""What fits: packs and layers computed again, for cards of all sizes."""

from dataclasses import replace
from itertools import pairwise

import pytest

from qwhisper.data.row_sizes import Rows
from qwhisper.engine.plan_choice import MOST_TOKENS, choose, largest_pack
from qwhisper.engine.plan_memory import GIB, Job, memory_of, pack_of
from qwhisper.engine.plan_sizes import AUDIO_SIZES, TEXT_SIZES
from qwhisper.engine.plan_speed import CARDS, card_called, flops_a_row, samples_a_second
from qwhisper.errors import MemoryLimitError

ROWS = Rows()
H200, RTX_5090 = (next(card for card in CARDS if card.name == name) for name in ("H200", "RTX 5090"))


def job(size: str = "8b", **values) -> Job:
    return Job(text=TEXT_SIZES[f"qwen3-{size}"], audio=AUDIO_SIZES["whisper-large-v3-turbo"], **values)


@pytest.mark.parametrize("again", [0, 20, 36])
@pytest.mark.parametrize("gib", [20, 24, 30, 40])
def test_the_largest_pack_fits_and_a_larger_one_does_not(gib, again):
    tokens = largest_pack(job(), ROWS, again, gib * GIB, 8192)
    assert not tokens or memory_of(job(), pack_of(ROWS, tokens), again).reserved <= gib * GIB
    assert tokens == 8192 or memory_of(job(), pack_of(ROWS, tokens + 64), again).reserved > gib * GIB


@pytest.mark.parametrize("card", [H200, RTX_5090])
@pytest.mark.parametrize("execution", ["plain", "captured"])
def test_less_free_memory_means_a_smaller_pack_or_more_layers_computed_again(card, execution):
    of = job(execution=execution)
    found = [choose(of, ROWS, 128, gib * GIB, card) for gib in (80, 40, 30, 26, 22)]
    for choice, gib in zip(found, (80, 40, 30, 26, 22), strict=True):
        assert choice.memory.reserved <= gib * GIB
    for more, less in pairwise(found):
        assert less.tokens < more.tokens or less.recompute_layers > more.recompute_layers or less == more
    assert found[0].recompute_layers == 0 and found[0].max_tokens_per_pack == MOST_TOKENS
    assert found[-1].tokens < found[0].tokens


def test_of_all_that_fits_the_fastest_is_chosen():
    of, budget = job(), 30 * GIB
    for card in (H200, RTX_5090):
        best = choose(of, ROWS, 128, budget, card)
        speeds = []
        for again in range(of.text.layers + 1):
            tokens = largest_pack(of, ROWS, again, budget, MOST_TOKENS)
            speeds.append(samples_a_second(of, ROWS, tokens, again, card, 128))
        assert speeds.index(max(speeds)) == best.recompute_layers
    # A slow card is bound by arithmetic, a fast one in plain execution by launches, which large packs save.
    assert choose(of, ROWS, 128, budget, RTX_5090).recompute_layers < best_on(H200)


def best_on(card) -> int:
    return choose(job(), ROWS, 128, 30 * GIB, card).recompute_layers


def test_a_small_step_needs_no_large_pack():
    small, large = (choose(job(), ROWS, samples, 30 * GIB, H200) for samples in (4, 128))
    assert small.recompute_layers == 0 < large.recompute_layers
    assert small.tokens < large.tokens
    # A step that is larger than expected makes two packs instead of running out of memory.
    assert memory_of(job(), pack_of(ROWS, small.max_tokens_per_pack), 0).reserved <= 30 * GIB


def test_what_the_user_gives_is_kept():
    choice = choose(job(), ROWS, 128, 30 * GIB, H200, max_tokens_per_pack=2048)
    assert choice.max_tokens_per_pack == 2048 and 0 < choice.recompute_layers < 36
    fewer = choose(job(), ROWS, 128, 30 * GIB, H200, max_tokens_per_pack=2048, recompute_layers=choice.recompute_layers)
    assert fewer == choice
    assert choose(job(), ROWS, 128, 30 * GIB, H200, recompute_layers=7).recompute_layers == 7
    # A row that is longer than the limit is alone in a pack.
    assert choose(job(), ROWS, 128, 30 * GIB, H200, max_tokens_per_pack=1).tokens == ROWS.longest


def test_nothing_fits_is_a_sentence_with_what_helps():
    with pytest.raises(MemoryLimitError, match=r"one dialogue of 537 tokens needs 1\d\.\d GiB .*--load_in_4bit"):
        choose(job(), ROWS, 4, 15 * GIB, H200)
    with pytest.raises(MemoryLimitError) as refused:
        choose(job(weights="nf4", whisper_cpu=True), ROWS, 4, 5 * GIB, H200, recompute_layers=0)
    assert "--gradient_checkpointing" in str(refused.value) and "--load_in_4bit" not in str(refused.value)


@pytest.mark.parametrize(
    ("weights", "card", "offered"),
    [("bf16", "H200", "--load_in_fp8, --load_in_4bit, "), ("bf16", "A100 80GB", "--load_in_4bit, "),
     ("fp8", "H200", "--load_in_4bit, "), ("nf4", "H200", "")],
)  # fmt: skip
def test_number_formats_that_need_less_and_that_the_card_has_are_offered(weights, card, offered):
    with pytest.raises(MemoryLimitError, match=f"are there; use {offered}--whisper_cpu, --max_length or"):
        choose(job(weights=weights), ROWS, 4, 5 * GIB, next(found for found in CARDS if found.name == card))


def test_with_dropout_layers_computed_again_are_planned_as_they_run():
    captured, plain = ({"execution": execution, "weights": "nf4"} for execution in ("captured", "plain"))
    without, dropout, of_plain = (
        choose(job("32b", **values), ROWS, 4, 26 * GIB, H200)
        for values in (captured, captured | {"dropout": True}, plain)
    )
    assert 0 < without.recompute_layers != dropout.recompute_layers and dropout == of_plain


# samples/s measured on an H200, lowest and highest; tokens: of the largest pack
@pytest.mark.parametrize(
    ("of", "tokens", "again", "samples", "lowest", "highest"),
    [
        (job("0.6b"), 8192, 0, 128, 87.2, 110.7),
        (job("0.6b"), 1247, 0, 4, 12.4, 16.9),
        (job("8b"), 7727, 36, 32, 31.2, 31.2),
        (job("8b"), 2059, 0, 8, 22.6, 22.6),
        (job("8b"), 1158, 0, 4, 10.7, 10.7),
    ],
)
def test_the_estimated_speed_is_within_a_quarter_of_the_measured_one(of, tokens, again, samples, lowest, highest):
    assert 0.75 * lowest <= samples_a_second(of, ROWS, tokens, again, H200, samples) <= 1.25 * highest


def test_speed_grows_with_cards_and_falls_with_layers_computed_again():
    one = samples_a_second(job(), ROWS, 4096, 0, H200, 128)
    assert samples_a_second(job(), ROWS, 4096, 0, H200, 128, num_gpus=4) == 4 * one
    assert samples_a_second(job(), ROWS, 4096, 36, H200, 128) < one
    assert samples_a_second(job(), ROWS, 4096, 0, RTX_5090, 128) < one
    # A third of the arithmetic of a frozen layer, forward and backward, is its forward pass once more.
    plain, again = (flops_a_row(job(lora_r=0), replace(ROWS, frames=0.0), layers) for layers in (0, 36))
    assert again / plain == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize(
    ("name", "gib", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 79, "H100"), ("NVIDIA H200", 140, "H200"), ("NVIDIA A100-SXM4-80GB", 79, "A100 80GB"),
        ("NVIDIA GeForce RTX 4090", 24, "RTX 4090"), ("Tesla T4", 15, "T4"), ("NVIDIA L4", 22, "L4"),
        ("NVIDIA L40S", 45, "RTX 5090"), ("NVIDIA GeForce RTX 3090 Ti", 24, "RTX 3090"),
    ],
)  # fmt: skip
def test_a_card_is_known_by_its_name_or_taken_for_one_of_its_size(name, gib, card):
    assert card_called(name, gib).name == card
