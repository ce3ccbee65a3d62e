"""Segment attention on a GPU: its errors, its time by tile, its time beside varlen, and whether its bits are the same.

    python benchmarks/attention_kernels.py
    python benchmarks/attention_kernels.py --part tiles --case lm-8b
    TRITON_INTERPRET=1 python benchmarks/attention_kernels.py --tiny    # a try on a CPU with Triton, 1 minute

--part:
    correct  against fp32, with the bounds of engine/preflight.py, by head size, grouping, window, dtype and layout
    tiles    microseconds of each kernel, by tile
    whole    forward, and forward and backward: with the tiles that `segment_attention.tiles` chooses, with the fastest
             of `tiles` if that part runs too, and varlen
    bits     whether a second call, a compiled call, and a CUDA graph replayed with other borders give the same bits
Times are those of launches in a CUDA graph.
"""

import argparse
import itertools
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch
from common import append_result
from device_time import DEVICE, captured, failure_recorded, microseconds, new_stream
from torch import Tensor

from qwhisper.engine.kernels import kernels_in_use
from qwhisper.engine.preflight import Attention, Kernel, Layout, first_fault, trials
from qwhisper.errors import first_line
from qwhisper.model import attention, segment_attention
from qwhisper.model.attention import PACKED_ATTENTION, PACKED_KERNELS
from qwhisper.model.segment_attention import KERNELS, LOG2_E, Tile
from qwhisper.model.segment_blocks import segment_blocks

NAME = "attention_kernels"
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CALLS = 20  # of a graph


@dataclass(frozen=True)
class Case:
    """A packed row: about so many tokens in so many segments, each at most `longest`. Causal: a language model."""

    tokens: int
    segments: int
    longest: int
    heads: int
    key_heads: int
    head_dim: int
    causal: bool

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.causal else 1.0  # Whisper scales its queries


CASES = {
    "encoder": Case(19008, 44, 1500, 20, 20, 64, False),
    "lm-0.6b": Case(8192, 44, 1000, 16, 8, 128, True),
    "lm-8b": Case(4096, 22, 1000, 32, 8, 128, True),
}
TINY_CASES = {"encoder": Case(192, 3, 150, 2, 2, 16, False), "lm": Case(160, 3, 100, 4, 2, 16, True)}

ENCODER_TILES = {
    "forward": [
        (128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 32, 4, 4),
        (64, 64, 4, 3), (64, 128, 4, 3), (128, 128, 4, 2),
    ],
    "backward_query": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 32, 8, 3)],
    "backward_key": [
        (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3), (128, 32, 4, 2),
    ],
}  # fmt: skip
LM_TILES = {
    "forward": [
        (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 4, 3),
        (128, 128, 8, 2), (64, 32, 4, 3), (64, 128, 4, 2), (64, 64, 8, 2),
    ],
    "backward_query": [
        (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 3), (64, 32, 4, 2), (128, 32, 8, 3),
        (64, 64, 8, 2), (64, 128, 8, 2),
    ],
    "backward_key": [
        (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2),
        (64, 64, 8, 2), (64, 64, 8, 3), (64, 128, 8, 2), (64, 16, 4, 3),
    ],
}  # fmt: skip
TILES = {"encoder": ENCODER_TILES, "lm-0.6b": LM_TILES, "lm-8b": LM_TILES}
TINY_TILES = {
    "encoder": {"forward": [(128, 64, 4, 2), (64, 32, 4, 2)]},
    "lm": {"backward_key": [(64, 32, 4, 2)]},
}
LAYOUTS = [(1, 63, 129, 500), (128,) * 5, (1000, 1, 77), (185,) * 8, (256, 255, 257), (2, 3, 5, 7, 11), (64,), (1,)]
Best = dict[tuple[str, str], tuple[int, ...]]  # the fastest tile, by case and kernel


def record(**line) -> None:
    append_result(NAME, line)


def skewed_lengths(case: Case, seed: int = 0) -> list[int]:
    """Of the case's segments, which together have its tokens; skewed as those of speech are."""
    choose = random.Random(seed)
    raw = [min(choose.lognormvariate(0, 0.7), 4) for _ in range(case.segments)]
    found = [max(1, min(case.longest, round(case.tokens * x / sum(raw)))) for x in raw]
    found[-1] = max(1, found[-1] + case.tokens - sum(found))
    while (over := found[-1] - case.longest) > 0:
        found[found.index(min(found))] += min(over, 200)
        found[-1] -= min(over, 200)
    return found


def borders_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


class Problem:
    """Tensors of a case, [tokens, heads, head_dim], for all kernels. heads_first: in memory the heads come first."""

    def __init__(self, case: Case, *, heads_first: bool = False):
        self.case = case
        self.lengths = skewed_lengths(case)
        self.borders = borders_of(self.lengths)
        self.tokens = self.borders[-1]
        self.cu_seq_lens = torch.tensor(self.borders, dtype=torch.int32, device=DEVICE)
        self.blocks = segment_blocks(self.borders).to(DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(0)

        def noise(heads: int, size: float = 1.0) -> Tensor:
            shape = (heads, self.tokens) if heads_first else (self.tokens, heads)
            x = (size * torch.randn(*shape, case.head_dim, generator=generator, device=DEVICE)).to(DTYPE)
            return x.transpose(0, 1) if heads_first else x

        self.query = noise(case.heads, 1.0 if case.causal else case.head_dim**-0.5)
        self.key, self.value = noise(case.key_heads), noise(case.key_heads)
        self.grad = noise(case.heads).contiguous()
        self.out, self.query_grad = (torch.empty_like(self.grad) for _ in range(2))
        self.key_grad, self.value_grad = (torch.empty(self.key.shape, dtype=DTYPE, device=DEVICE) for _ in range(2))
        self.lse, self.delta = (torch.zeros(case.heads, self.tokens, device=DEVICE) for _ in range(2))

    def launch(self, kernel: str) -> None:
        """Start one kernel as the operators of `segment_attention` do. The backward ones need forward's result."""
        case, inputs = self.case, (self.query, self.key, self.value)
        heads = case.key_heads if kernel == "backward_key" else case.heads
        scales: tuple[float, ...] = (case.scale, case.scale * LOG2_E)
        if kernel == "forward":
            tensors, results, scales = inputs, (self.out, self.lse), scales[1:]
        elif kernel == "backward_query":
            tensors, results = (self.grad, *inputs), (self.out, self.lse, self.delta, self.query_grad)
        else:
            tensors, results = (self.grad, *inputs), (self.lse, self.delta, self.key_grad, self.value_grad)
        stride = (self.key_grad if kernel == "backward_key" else self.out).stride(0)
        segment_attention._launch(
            kernel, heads, self.query, self.key, self.blocks, case.causal, 0,
            *tensors, *results, self.blocks, *segment_attention._strides(*tensors), stride, self.tokens, *scales,
        )  # fmt: skip

    def attend(self, kernel: str, leaves: list[Tensor], *, backward: bool) -> object:
        """A call of one of PACKED_KERNELS. leaves: query, key and value, [1, heads, tokens, head_dim]."""
        with torch.set_grad_enabled(backward):
            out = PACKED_KERNELS[kernel](
                *leaves, self.cu_seq_lens, max(self.lengths), scale=self.case.scale, causal=self.case.causal,
                window=None, dropout=0.0, cu_seq_lens_host=tuple(self.borders), segment_blocks=self.blocks,
            )  # fmt: skip
        return torch.autograd.grad(out, leaves, self.grad) if backward else out


@contextmanager
def tile_set(kernel: str, tile: tuple[int, ...]) -> Iterator[None]:
    """Within it a kernel has this tile, for all head sizes."""
    before = segment_attention.tiles

    def tiles(head_dim: int, capability: tuple[int, int]):
        return replace(before(head_dim, capability), **{KERNELS[kernel]: Tile(*tile)})

    segment_attention.tiles = tiles
    try:
        yield
    finally:
        segment_attention.tiles = before


def attentions(*, tiny: bool) -> list[Attention]:
    base = Attention(
        owner="language model", groups=2, head_dim=128, scale=0.1, causal=True, window=None, dtype=DTYPE,
        device=DEVICE, trained=True,
    )  # fmt: skip
    encoder = replace(base, owner="encoder", groups=1, scale=1.0, causal=False)
    found = []
    for head_dim in (16,) if tiny else (64, 80, 96, 128):
        found += [replace(base, head_dim=head_dim), replace(base, head_dim=head_dim, groups=4, window=100)]
        found.append(replace(encoder, head_dim=head_dim))
    if tiny:
        return found
    found += [replace(base, dtype=torch.float16), replace(encoder, head_dim=64, dtype=torch.float16)]
    return [*found, replace(base, head_dim=256), replace(base, groups=8)]


def segments_kernel(checked: Attention) -> Kernel:
    (name, kernel, _), *_ = kernels_in_use(checked, PACKED_ATTENTION)
    assert name == "segments", f"{name} is used in place of our kernels"
    return kernel


def compile_tile(case: Case, kernel: str, tile: tuple[int, ...]) -> str | None:
    """In a process of a pool: fills Triton's cache on disk. Returns why it failed."""
    try:
        with tile_set(kernel, tile):
            Problem(case).launch(kernel)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)[:120]}"
    return None


def compile_attention(checked: Attention) -> None:
    first_fault(segments_kernel(checked), [(checked, Layout((70, 3), True))])


def compile_all(parts: list[str], cases: dict[str, Case], tiles: dict[str, dict], *, tiny: bool) -> None:
    """Many at once, since Triton compiles a kernel in one thread."""
    tasks = {}
    for name, kernels in tiles.items():
        for kernel, tile in ((kernel, tile) for kernel, choices in kernels.items() for tile in choices):
            same_code = cases[name].head_dim, cases[name].causal, kernel, tile
            tasks[same_code] = cases[name], kernel, tile
    with get_context("spawn").Pool(min(12, os.cpu_count() or 1)) as pool:
        if "correct" in parts:
            with failure_recorded(NAME, part="compile"):
                pool.map(compile_attention, attentions(tiny=tiny), chunksize=1)
        if "tiles" in parts:
            reasons = pool.starmap(compile_tile, list(tasks.values()), chunksize=1)
            failed = [(*code, reason) for code, reason in zip(tasks, reasons, strict=True) if reason]
            record(part="compile", tiles=len(tasks), failed=failed)


def check_results(*, tiny: bool) -> None:
    for checked in attentions(tiny=tiny):
        what = {name: getattr(checked, name) for name in ("owner", "head_dim", "groups", "causal", "window")}
        what["dtype"] = str(checked.dtype).removeprefix("torch.")
        layouts = trials(checked, 70 if tiny else 1500, packed=True)
        layouts += [(checked, Layout(lengths, True)) for lengths in ([(5, 66)] if tiny else LAYOUTS)]
        with failure_recorded(NAME, part="correct", **what):
            fault = first_fault(segments_kernel(checked), layouts)
            record(part="correct", **what, layouts=len(layouts), fault=None if fault is None else str(fault)[:300])


def time_tiles(cases: dict[str, Case], tiles: dict[str, dict]) -> Best:
    """One line a tile, the fastest first. Returns the fastest ones."""
    best: Best = {}
    for name, kernels in tiles.items():
        problem = Problem(cases[name], heads_first=name == "encoder")
        problem.launch("forward")
        for kernel, choices in kernels.items():
            times: dict[tuple[int, ...], float] = {}
            for tile in choices:
                with failure_recorded(NAME, part="tiles", case=name, kernel=kernel, tile=tile), tile_set(kernel, tile):
                    times[tile] = microseconds(partial(problem.launch, kernel), CALLS)
            for tile in sorted(times, key=times.__getitem__):
                best.setdefault((name, kernel), tile)
                record(part="tiles", case=name, kernel=kernel, tile=tile, us=round(times[tile], 1))
    return best


def time_whole(name: str, case: Case, best: Best) -> None:
    fastest = {kernel: tile for (owner, kernel), tile in best.items() if owner == name}
    choices = [("segments", {}), ("varlen" if DEVICE.type == "cuda" else "sdpa_per_segment", {})]
    choices += [("segments", fastest)] if fastest else []
    for heads_first, backward in itertools.product((False, True), (False, True)):
        problem = Problem(case, heads_first=heads_first)
        leaves = [x.transpose(0, 1)[None].requires_grad_() for x in (problem.query, problem.key, problem.value)]
        line = {"part": "whole", "case": name, "heads_first": heads_first, "backward": backward}
        for kernel, tiles in choices:
            with failure_recorded(NAME, **line, kernel=kernel, tiles=tiles), ExitStack() as stack:
                for forced in itertools.starmap(tile_set, tiles.items()):
                    stack.enter_context(forced)
                work = partial(problem.attend, kernel, leaves, backward=backward)
                record(**line, kernel=kernel, tiles=tiles, us=round(microseconds(work, CALLS), 1))


class Bits:
    """Result and gradients of one row, cut into segments in three ways."""

    def __init__(self, case: Case):
        self.problem = Problem(case)
        others = (segment_blocks(borders_of(skewed_lengths(case, seed))).to(DEVICE) for seed in (1, 2))
        self.tables = [self.problem.blocks, *others]
        self.expected = [self.run(self.leaves(), table) for table in self.tables]

    def leaves(self) -> list[Tensor]:
        """New ones, which no other autograd graph has used on another stream."""
        return [x.clone().requires_grad_() for x in (self.problem.query, self.problem.key, self.problem.value)]

    def run(self, leaves: list[Tensor], table: Tensor) -> list[Tensor]:
        out, _ = segment_attention.segment_attention(*leaves, table, self.problem.case.scale, True, 0)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.problem.grad)]

    def repeats(self) -> dict:
        again = [self.run(self.leaves(), table) for table in self.tables]
        equal = [same_bits(*pair) for pair in zip(again, self.expected, strict=True)]
        return {"equal": equal, "borders_matter": not torch.equal(self.expected[0][0], self.expected[1][0])}

    def without_wait(self) -> dict:
        leaves = self.leaves()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.run(leaves, self.tables[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"raised": False}

    def compiled(self) -> dict:
        scale = self.problem.case.scale

        def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
            return segment_attention.segment_attention(query * 1.0, key, value, table, scale, True, 0)[0]

        compiled = torch.compile(attend, fullgraph=True, dynamic=False)
        leaves = self.leaves()
        out = compiled(*leaves, self.tables[0])
        grads = torch.autograd.grad(out, leaves, self.problem.grad)
        return {"equal": [same_bits([out, *grads], self.expected[0])]}

    def replays(self) -> dict:
        table = self.tables[0].clone()
        stream = new_stream()
        with torch.cuda.stream(stream):
            leaves = self.leaves()
        graph, found = captured(lambda: self.run(leaves, table), stream=stream)
        equal = []
        for other, right in zip(self.tables, self.expected, strict=True):
            table.copy_(other)
            graph.replay()
            equal.append(same_bits(found, right))
        return {"equal": equal}


def same_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def compare_bits(case: Case) -> None:
    bits = Bits(case)
    ways = {"repeated": bits.repeats}
    if DEVICE.type == "cuda":
        ways |= {"no wait for the device": bits.without_wait, "compiled": bits.compiled, "replayed": bits.replays}
    for way, compare in ways.items():
        with failure_recorded(NAME, part="bits", way=way):
            record(part="bits", way=way, **compare())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("correct", "tiles", "whole", "bits")
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="of tiles and whole")
    parser.add_argument("--tiny", action="store_true", help="small tensors")
    args = parser.parse_args()
    cases = TINY_CASES if args.tiny else {name: CASES[name] for name in args.case}
    tiles = TINY_TILES if args.tiny else {name: TILES[name] for name in args.case}
    if DEVICE.type == "cuda":
        chosen = {size: segment_attention.tiles(size, torch.cuda.get_device_capability()) for size in (64, 128, 256)}
        chosen_tiles = {size: None if found is None else astuple(found) for size, found in chosen.items()}
        record(part="card", why_not=segment_attention.why_not(128, 0), tiles=chosen_tiles)
        if {"correct", "tiles"} & set(args.part):
            compile_all(args.part, cases, tiles, tiny=args.tiny)
    else:
        attention.segments_can_run = lambda query, dropout: True  # Triton's interpreter
    if "correct" in args.part:
        check_results(tiny=args.tiny)
    best = time_tiles(cases, tiles) if "tiles" in args.part else {}
    if "whole" in args.part:
        for name, case in cases.items():
            with failure_recorded(NAME, part="whole", case=name):
                time_whole(name, case, best)
    if "bits" in args.part:  # last: a capture that fails can leave the device unusable
        compare_bits(TINY_CASES["lm"] if args.tiny else CASES["lm-0.6b"])


if __name__ == "__main__":
    main()
