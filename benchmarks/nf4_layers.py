"""Linears in NF4 on a GPU: times and memory of bitsandbytes' way and ours, and the loading of whole bases.

    python benchmarks/nf4_layers.py
    python benchmarks/nf4_layers.py --part layers --layers 4 --tokens 768 2048 4096
    python benchmarks/nf4_layers.py --part load --size 8b 14b 32b --tokenizer DIR --output_dir DIR
    python benchmarks/nf4_layers.py --tiny    # a try on a CPU; most of it is compiling

--part:
    dequantise  microseconds of a weight: bitsandbytes' kernels, with nested scales and without, and one in Triton
    layers      forward and backward of the linears of decoder layers of Qwen3-8B's shapes, without attention: in bf16,
                by bitsandbytes, by ours; eager and compiled, in a CUDA graph, with recompute; their peak of memory, and
                whether gradients have the same bits as in the first case of their way
    load        a base with random weights: seconds and memory of loading it, on the host and on the card
"ours" follows --gradient_checkpointing: with recompute it keeps a layer's weights from the second forward pass on.
"ours, not kept" dequantises them once more. Without --part: dequantise and layers, about 4 minutes on an H200.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from common import append_result
from device_time import (
    DEVICE,
    captured,
    failure_recorded,
    forget_peak_memory,
    microseconds,
    peak_gib,
    seconds_of,
    wait,
)
from load_once import peak_of_rss_anon
from real_shapes import SIZES, make_bases
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwhisper.model.bases import LoadOptions, load_language_model
from qwhisper.model.four_bit import adopt_4bit_linears

try:
    import nf4_triton
except ImportError:  # no Triton
    nf4_triton = None

NAME = "nf4_layers"
DTYPE = torch.bfloat16
MATRICES = [(4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288), (25600, 5120)]  # output and input features
TINY_MATRICES = [(64, 128), (128, 64)]
WIDTHS = (4096, 1024, 12288)  # of Qwen3-8B: hidden, keys, intermediate
TINY_WIDTHS = (64, 32, 128)
TRITON_SETTINGS = [(512, 4), (1024, 4), (2048, 8), (4096, 8)]  # bytes of a program, warps
BYTES_MOVED = 2 + 0.5 + 1 / 64  # of a weight: written in bf16, read in 4 bits, and its share of a scale
CALLS = 20  # of a graph of one kernel


def record(**line) -> None:
    append_result(NAME, line | {"bitsandbytes": bitsandbytes.__version__})


def dequantise_ways(weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    plain_packed, plain_state = quantize_4bit(weight, compress_statistics=False, quant_type="nf4")
    ways = {
        "bitsandbytes": lambda: dequantize_4bit(packed, state),
        "bitsandbytes, scales in fp32": lambda: dequantize_4bit(plain_packed, plain_state),
    }
    if nf4_triton is not None and DEVICE.type == "cuda":
        for block, warps in TRITON_SETTINGS:
            way = f"Triton, blocks of {block}, {warps} warps"
            ways[way] = partial(nf4_triton.dequantise, packed, state, block, warps)
    return ways


def time_dequantise(shape: tuple[int, int], tokens: int) -> None:
    """Beside each other, and beside a product of the weight and as many tokens."""
    weight = 0.02 * torch.randn(shape, device=DEVICE, dtype=DTYPE)
    ways = dequantise_ways(weight)
    expected = ways["bitsandbytes"]()
    what = {"part": "dequantise", "shape": shape}
    for way, call in ways.items():
        with failure_recorded(NAME, **what, way=way):
            differing = float((call() != expected).float().mean())
            us = microseconds(call, CALLS)
            eager_us = round(1e6 * seconds_of(call, CALLS), 1)
            rate = round(BYTES_MOVED * weight.numel() / us / 1e3)
            record(**what, way=way, us=round(us, 1), eager_us=eager_us, gb_s=rate, differing=differing)
    x = torch.randn(tokens, shape[1], device=DEVICE, dtype=DTYPE)
    us = microseconds(partial(F.linear, x, expected), CALLS)
    operations = 2 * tokens * weight.numel()
    record(**what, way="product", tokens=tokens, us=round(us, 1), tflops=round(operations / us / 1e6, 3))


class Layer(nn.Module):
    """The linears of a decoder layer, with its elementwise parts and without attention."""

    def __init__(self, make: Callable[[int, int], nn.Module], widths: tuple[int, int, int]):
        super().__init__()
        hidden, keys, intermediate = widths
        self.groups = hidden // keys
        self.query, self.key, self.value = make(hidden, hidden), make(hidden, keys), make(hidden, keys)
        self.out = make(hidden, hidden)
        self.gate, self.up, self.down = (
            make(hidden, intermediate),
            make(hidden, intermediate),
            make(intermediate, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, x.shape[-1:])
        query, key, value = self.query(normed), self.key(normed), self.value(normed)
        x = x + self.out(query * torch.sigmoid(key.repeat(1, self.groups)) + value.repeat(1, self.groups))
        normed = F.rms_norm(x, x.shape[-1:])
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def make_linear(inputs: int, outputs: int, *, nf4: bool) -> nn.Module:
    weight = 0.02 * torch.randn(outputs, inputs, device=DEVICE, dtype=DTYPE)
    if not nf4:
        linear = nn.Linear(inputs, outputs, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear
    quantised = bitsandbytes.nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=DTYPE, quant_type="nf4", device="meta"
    )
    quantised.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=quantised
    ).to(DEVICE)
    quantised.support_avx512bf16_for_cpu = False  # its layout has no backward pass
    return quantised


def make_layers(way: str, count: int, widths: tuple[int, int, int], *, kept: bool) -> nn.ModuleList:
    """kept: ours keeps the dequantised weights of a layer that is computed again."""
    torch.manual_seed(0)
    make = partial(make_linear, nf4=way != "bf16")
    layers = nn.ModuleList(Layer(make, widths) for _ in range(count)).train()
    if way == "ours":
        adopt_4bit_linears(layers)
        for module in layers.modules():
            if hasattr(module, "recomputed"):
                module.recomputed = kept
    return layers


class Pass:
    """Forward and backward of layers, which leaves the gradient of x, and what it is compared with."""

    def __init__(self, tokens: int, hidden: int):
        self.tokens = tokens
        self.x = torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE, requires_grad=True)
        self.grad = torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE)
        self.x.grad = torch.zeros_like(self.x)
        self.first: dict[str, Tensor] = {}  # gradient of the first run, by way

    def run(self, layers: nn.ModuleList, *, recompute: bool) -> None:
        hidden_states = self.x
        for layer in layers:
            if recompute:
                hidden_states = checkpoint(layer, hidden_states, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_states = layer(hidden_states)
        self.x.grad.zero_()
        hidden_states.backward(self.grad)

    def differences(self, way: str) -> dict:
        """Of the gradient from that of the way's first run."""
        now = self.x.grad.clone()
        first = self.first.setdefault(way, now)
        largest = float((now - first).abs().max() / first.abs().max())
        return {"same_bits_as_first": torch.equal(now, first), "relative_difference": largest}


def measure_pass(work: Callable[[], None], num_layers: int, *, graph: bool) -> dict:
    """Time of a layer and the peak of memory, weights not counted."""
    gc.collect()
    forget_peak_memory()
    weights = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    calls = 10 if DEVICE.type == "cuda" else 1
    step = captured(work)[0].replay if graph else work
    for _ in range(3 if DEVICE.type == "cuda" else 1):
        step()
    seconds = seconds_of(step, calls)
    return {"ms_a_layer": round(1e3 * seconds / num_layers, 3), "peak_gib": peak_gib(beyond=weights)}


def time_layers(tokens: int, count: int, widths: tuple[int, int, int]) -> None:
    compared = Pass(tokens, widths[0])
    cases = [(False, way, False) for way in ("bf16", "bitsandbytes", "ours")]
    cases += [
        (True, way, kept) for way, kept in (("bf16", False), ("bitsandbytes", False), ("ours", False), ("ours", True))
    ]
    for recompute, way, kept in cases:
        layers = make_layers(way, count, widths, kept=kept)
        name = "ours, not kept" if way == "ours" and recompute and not kept else way
        for compiled, graph in itertools.product((False, True), (False, True) if DEVICE.type == "cuda" else (False,)):
            if compiled and not graph:
                torch._dynamo.reset()
                for layer in layers:
                    layer.compile(dynamic=False, fullgraph=True)
            what = {"part": "layers", "tokens": tokens, "way": name, "recompute": recompute}
            what |= {"compiled": compiled, "graph": graph}
            with failure_recorded(NAME, **what):
                work = partial(compared.run, layers, recompute=recompute)
                measured = measure_pass(work, count, graph=graph)
                record(**what, **measured, **compared.differences(way))


def measure_load(size: str, tokenizer: Path, folder: Path) -> None:
    begun = time.perf_counter()
    _, text = make_bases(folder / "bases", size, tokenizer, nf4=True)
    make_s = time.perf_counter() - begun
    stored = sum(file.stat().st_size for file in text.glob("*.safetensors"))
    gc.collect()
    forget_peak_memory()
    with peak_of_rss_anon() as peak:
        before, begun = peak[0], time.perf_counter()
        model = load_language_model(str(text), LoadOptions(dtype="bf16"))
        wait()
        load_s = time.perf_counter() - begun
    line = {"part": "load", "size": size, "make_s": round(make_s, 1), "load_s": round(load_s, 1)}
    line |= {"file_gib": round(stored / 2**30, 3), "host_peak_of_file": round((peak[0] - before) / stored, 3)}
    if DEVICE.type == "cuda":
        line["allocated_gib"] = round(torch.cuda.memory_allocated() / 2**30, 3)
        line["max_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    tokens = torch.arange(2048 if DEVICE.type == "cuda" else 20, device=model.device)[None]
    with torch.no_grad():
        hidden_states = model.base_model(input_ids=tokens).last_hidden_state
    record(**line, finite=bool(torch.isfinite(hidden_states).all()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("dequantise", "layers", "load"), default=["dequantise", "layers"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[768, 2048, 4096])
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["8b"], help="of load")
    parser.add_argument("--tokenizer", type=Path, help="of load")
    parser.add_argument("--output_dir", type=Path, help="of load")
    parser.add_argument("--tiny", action="store_true", help="small matrices, 40 tokens")
    args = parser.parse_args()
    if "load" in args.part and not (args.tokenizer and args.output_dir):
        parser.error("--part load needs --tokenizer and --output_dir")
    if "dequantise" in args.part:
        for shape in TINY_MATRICES if args.tiny else MATRICES:
            with failure_recorded(NAME, part="dequantise", shape=shape):
                time_dequantise(shape, 8 if args.tiny else 2048)
    if "layers" in args.part:
        for tokens in [40] if args.tiny else args.tokens:
            with failure_recorded(NAME, part="layers", tokens=tokens):
                time_layers(tokens, args.layers, TINY_WIDTHS if args.tiny else WIDTHS)
    if "load" in args.part:
        for size in args.size:
            with failure_recorded(NAME, part="load", size=size):
                measure_load(size, args.tokenizer, args.output_dir.resolve())


if __name__ == "__main__":
    main()
