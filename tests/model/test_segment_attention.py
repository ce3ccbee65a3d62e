"""Attention by the kernels of this package: their tables and choices anywhere, their numbers on a GPU.

Without a GPU, Triton's interpreter runs the kernels:
`TRITON_INTERPRET=1 python -m pytest tests/model/test_segment_attention.py`, with the package `triton` installed.
"""

import functools
import itertools
import os
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qwhisper.engine.kernels import kernels_in_use
from qwhisper.engine.preflight import Attention, Layout, first_fault, trials
from qwhisper.model import attention, segment_attention
from qwhisper.model.segment_attention import LARGE_TILES, SMALL_TILES, Tile, tiles, why_not
from qwhisper.model.segment_blocks import BLOCK_ROWS, num_blocks, segment_blocks

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
# Name of a card: compute capability, KB of shared memory that a block of threads may use, whether our kernels run.
CARDS = {
    "T4": ((7, 5), 64, False),
    "A100": ((8, 0), 163, True),
    "3090": ((8, 6), 99, True),
    "4090": ((8, 9), 99, True),
    "H100": ((9, 0), 227, True),
    "5090": ((12, 0), 99, True),
}
QWEN3 = Attention(
    owner="language model", groups=2, head_dim=128, scale=128**-0.5, causal=True, window=None,
    dtype=torch.bfloat16, device=torch.device("cuda"), trained=True,
)  # fmt: skip
WHISPER = replace(QWEN3, owner="encoder", groups=1, head_dim=64, scale=1.0, causal=False)


def borders_of(lengths) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def random_lengths(seed: int) -> list[int]:
    choose = random.Random(seed)
    return [choose.choice((0, 1, 63, 64, 65, 127, 128, 129, 192, choose.randrange(400))) for _ in range(9)]


# The table of blocks


@pytest.mark.parametrize("seed", range(20))
def test_every_row_lies_in_one_block_and_each_block_in_one_segment(seed):
    lengths = random_lengths(seed)
    blocks = segment_blocks(borders_of(lengths))
    assert blocks.dtype == torch.int32 and blocks.shape == (num_blocks(sum(lengths), len(lengths)), 3)
    segment_of = [number for number, length in enumerate(lengths) for _ in range(length)]
    rows = []
    for first, begin, end in blocks.tolist():
        here = range(first, min(first + BLOCK_ROWS, end))
        rows += here
        assert all((begin, end) == tuple(borders_of(lengths)[segment_of[row] :][:2]) for row in here)
    assert rows == list(range(sum(lengths)))


def test_packs_of_one_shape_have_tables_of_one_size_that_is_no_larger_than_they_need():
    sizes = {len(segment_blocks(borders_of(lengths))) for lengths in ([4 * 129, 0, 0, 0], [129] * 4, [1, 1, 1, 513])}
    assert sizes == {8} and num_blocks(4 * 129, 4) == 4 * 2


# The choice of kernels and tiles


@pytest.fixture
def card(request, monkeypatch):
    """A machine that claims to have this card, and on which Triton starts kernels."""
    capability, *rest = CARDS[request.param]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(segment_attention, "start_a_kernel", lambda device: None)
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
    segment_attention._why_not.cache_clear()
    yield capability, *rest
    segment_attention._why_not.cache_clear()


@pytest.mark.parametrize("card", CARDS, indirect=True)
def test_each_card_has_its_kernels_by_name(card):
    capability, _, runs = card
    with FakeTensorMode():
        query = torch.empty(1, 8, 4, 128, dtype=torch.bfloat16, device="cuda:0")
        assert attention.packed_kernel("qwhisper_packed", query, has_blocks=True) == ("segments" if runs else "varlen")
        assert attention.packed_kernel("qwhisper_packed", query, has_blocks=False) == "varlen"
        assert attention.packed_kernel("qwhisper_packed", query, 0.1, has_blocks=True) == "sdpa_per_segment"
        for other in (query.float(), query.cpu(), query.new_empty(1, 8, 4, 320)):
            kernel = attention.packed_kernel("qwhisper_packed", other, has_blocks=True)
            assert kernel == "sdpa_per_segment"
    if not runs:
        assert why_not(128, 0) == f"no tiles for heads of 128 on compute capability {capability[0]}.{capability[1]}"


@pytest.mark.parametrize("card", ["H100"], indirect=True)
@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'triton'"), RuntimeError("no C compiler\nx")])
def test_a_machine_that_starts_no_kernel_uses_varlen_and_says_why(card, error, monkeypatch):
    def start(device):
        raise error

    monkeypatch.setattr(segment_attention, "start_a_kernel", start)
    with FakeTensorMode():
        query = torch.empty(1, 8, 4, 128, dtype=torch.float16, device="cuda:0")
        assert attention.packed_kernel("qwhisper_packed", query, has_blocks=True) == "varlen"
    first_line = str(error).split("\n")[0]
    assert why_not(128, 0) == f"Triton does not run ({type(error).__name__}: {first_line})"


def test_the_choice_is_a_constant_of_a_compiled_function(monkeypatch):
    monkeypatch.setattr(segment_attention, "_why_not", functools.cache(lambda head_dim, device: None))
    compiled = torch.compile(lambda x: x + 1 if why_not(128, 0) is None else x - 1, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 1


def shared_bytes(kernel: str, tile: Tile, head_dim: int) -> int:
    """Of 16-bit tensors in shared memory: tiles that stay, loads under way, and 16 KB for a product's factor."""
    stay = 1 if kernel == "forward" else 2
    return 2 * head_dim * (stay * tile.rows + 2 * tile.stages * tile.step) + 16 * 1024


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
def test_tiles_fit_into_the_shared_memory_of_each_card(name, head_dim):
    capability, kilobytes, runs = CARDS[name]
    found = tiles(head_dim, capability)
    assert (found is not None) == runs
    for kernel in segment_attention.KERNELS.values() if runs else ():
        tile = getattr(found, kernel)
        assert shared_bytes(kernel, tile, 1 << (head_dim - 1).bit_length()) <= kilobytes * 1024
        assert BLOCK_ROWS % tile.rows == 0 and min(tile.rows, tile.step) >= 16


def test_heads_wider_than_256_have_no_tiles():
    assert tiles(257, (9, 0)) is None and tiles(256, (9, 0)) == LARGE_TILES[256]
    assert tiles(65, (12, 0)) == tiles(128, (12, 0)) == SMALL_TILES[128]


# The operator in graphs


def test_the_operator_and_its_gradients_are_traced_without_values():
    with FakeTensorMode():
        query = torch.empty(4, 70, 16, dtype=torch.bfloat16).transpose(0, 1).requires_grad_()
        key, value = (torch.empty(70, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        blocks = torch.empty(1, 3, dtype=torch.int32)
        out, lse = segment_attention.segment_attention(query, key, value, blocks, 0.25, True, 0)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((70, 4, 16), torch.bfloat16, (4, 70), torch.float32)
        grads = torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
        assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]


class Causal(torch.nn.Module):
    is_causal, num_key_value_groups = True, 2


CAUSAL = Causal()


def attend(query: Tensor, key: Tensor, value: Tensor, **packed) -> Tensor:
    return attention.packed_attention_forward(CAUSAL, query, key, value, None, scaling=0.25, **packed)[0]


def keywords(lengths, device="cpu") -> dict:
    borders = borders_of(lengths)
    return {
        "cu_seq_lens_q": torch.tensor(borders, dtype=torch.int32, device=device),
        "max_length_q": max(lengths),
        "cu_seq_lens_host": tuple(borders),
        "segment_blocks": segment_blocks(borders).to(device),
    }


def test_another_longest_sample_does_not_compile_a_layer_again(monkeypatch):
    monkeypatch.setattr(attention, "segments_can_run", lambda query, dropout: True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *args: (torch.zeros(1, 8, 4, 16),)

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend=backend)
    heads = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)
    for lengths in ([5, 3], [2, 6], [8, 0]):
        compiled(*heads, **keywords(lengths))
    assert len(graphs) == 1 and "qwhisper.segment_attention" in str(graphs[0].graph)


# Numbers


def reference(query: Tensor, key: Tensor, value: Tensor, lengths, scale: float, causal: bool, window: int) -> Tensor:
    """[tokens, heads, head_dim] fp32."""
    groups, outs = query.shape[1] // key.shape[1], []
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    for start, end in itertools.pairwise(borders_of(lengths)):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & (distance < (window or end - start)) if causal else distance < end
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        p = scores.masked_fill(~seen.to(scores.device), -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", p, value[start:end]))
    return torch.cat(outs)


@pytest.fixture
def kernels():
    pytest.importorskip("triton")


@interpreted
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "causal", "window"),
    [
        ([64, 65, 1, 127, 128, 192], (2, 1), 16, True, 0),
        ([0, 5, 0, 200, 64], (2, 2), 80, False, 0),
        ([192, 65, 150], (4, 2), 32, True, 100),
        ([150, 20], (2, 1), 16, True, 7),
        ([130, 0, 40], (2, 1), 16, True, 1),
    ],
)
def test_results_and_gradients_are_those_of_softmax_attention(lengths, heads, head_dim, causal, window, kernels):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    query, grad, key, value = (
        torch.randn(tokens, n, head_dim, generator=generator) for n in (heads[0], heads[0], heads[1], heads[1])
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    scale, blocks = head_dim**-0.5, segment_blocks(borders_of(lengths))
    strided = query.transpose(0, 1).contiguous().transpose(0, 1)
    out, lse = segment_attention.segment_attention(strided, key, value, blocks, scale, causal, window)
    assert lse.isfinite().all()
    expected = reference(query, key, value, lengths, scale, causal, window)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    found, right = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close(found, right, atol=5e-6, rtol=1e-5)


INTERPRETED = [
    replace(QWEN3, head_dim=16, scale=0.25, dtype=torch.float32),
    replace(QWEN3, head_dim=32, scale=0.2, dtype=torch.float16, window=48),
    replace(WHISPER, head_dim=16, dtype=torch.float16),
]


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_the_preflight_finds_no_fault_in_the_interpreter(case, kernels, monkeypatch):
    monkeypatch.setattr(attention, "segments_can_run", lambda query, dropout: True)
    case = replace(case, device=torch.device("cpu"))
    (name, kernel, _), *_ = kernels_in_use(case, "qwhisper_packed")
    assert name == "segments" and first_fault(kernel, trials(case, 150, packed=True)) is None


ON_A_GPU = [
    replace(attention_of, head_dim=head_dim, scale=scale, **changes)
    for attention_of, scale in ((QWEN3, 0.1), (WHISPER, 1.0))
    for head_dim in (64, 80, 96, 128, 256)
    for changes in ({}, {"dtype": torch.float16}, {"groups": 4, "window": 100})
]


@needs_gpu
@pytest.mark.parametrize("case", ON_A_GPU, ids=str)
def test_the_preflight_finds_no_fault_on_this_card(case, kernels):
    case = replace(case, trained=True)
    (name, kernel, _), *_ = kernels_in_use(case, "qwhisper_packed")
    if name != "segments":
        pytest.skip(why_not(case.head_dim, 0))
    layouts = [(case, Layout(lengths, True)) for lengths in ((1, 63, 129, 500), (128,) * 5, (1000, 1, 77))]
    assert first_fault(kernel, trials(case, 1500, packed=True) + layouts) is None


def random_heads(tokens: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(1, n, tokens, 64, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for n in (4, 2, 2)
    ]


def result_and_gradients(function, heads: list[Tensor], packed: dict) -> list[Tensor]:
    out = function(*heads, **packed)
    return [out, *torch.autograd.grad(out.square().sum(), heads)]


@pytest.fixture
def on_this_card(kernels):
    if reason := why_not(64, 0):
        pytest.skip(reason)


@needs_gpu
def test_a_replay_with_other_borders_gives_what_a_call_gives_to_the_last_bit(on_this_card):
    heads, rows = random_heads(700), [keywords(lengths, "cuda") for lengths in ([300, 400], [17, 683], [0, 700])]
    expected = [result_and_gradients(attend, heads, packed) for packed in rows]
    assert not torch.equal(expected[0][0], expected[1][0])
    blocks = rows[0]["segment_blocks"].clone()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result_and_gradients(attend, heads, rows[0] | {"segment_blocks": blocks})
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        found = result_and_gradients(attend, heads, rows[0] | {"segment_blocks": blocks})
    for packed, right in zip(rows, expected, strict=True):
        blocks.copy_(packed["segment_blocks"])
        graph.replay()
        assert all(torch.equal(mine, other) for mine, other in zip(found, right, strict=True))


@needs_gpu
def test_calls_repeat_to_the_last_bit_and_never_wait_for_the_device(on_this_card):
    heads, packed = random_heads(900), keywords([500, 1, 399], "cuda")
    first = result_and_gradients(attend, heads, packed)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [result_and_gradients(attend, heads, packed) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(torch.equal(a, b) for one in again for a, b in zip(one, first, strict=True))


@needs_gpu
def test_compiled_it_gives_the_same(on_this_card):
    heads, packed = random_heads(300), keywords([100, 200], "cuda")
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=False)
    pairs = zip(result_and_gradients(compiled, heads, packed), result_and_gradients(attend, heads, packed), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)
