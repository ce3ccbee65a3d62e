"""Products and layers in fp8 (model/fp8.py) on a GPU, beside bf16: times, errors, and whether they are finite.

    python benchmarks/fp8_products.py
    python benchmarks/fp8_products.py --part product layer --tokens 8192
    python benchmarks/fp8_products.py --tiny    # a try on a CPU; most of it is compiling

--part:
    product  forward and input gradient for each matrix of Qwen3-8B: bf16, fp8 eager, fp8 compiled
    pieces   what these consist of: products by scales and accumulation; quantising and transposing, eager, by Inductor
             and by kernels in Triton that the package could use
    errors   against fp32 products of the weights, and of the quantised values; by product and accumulation
    repeats  the package's own check, and compiled passes with extreme rows: whether each one is finite
    layer    a decoder layer of Qwen3-8B with LoRA on all linears, compiled, in bf16 and in fp8, and its memory
    capture  whether forward and backward in a CUDA graph give the same bits
Times are those of CUDA graphs, over several weights in turn, so that none stays in the L2 cache.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from common import append_result
from device_time import DEVICE, captured, failure_recorded, forget_peak_memory, microseconds, new_stream, peak_gib, wait
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from qwhisper.engine.fp8_check import Case, fault_of
from qwhisper.model import fp8
from qwhisper.model.fp8 import DEQUANTISED, PRODUCTS, ROWWISE, TENSORWISE, Float8Linear, dequantise, quantise_rows
from qwhisper.model.lora import LoraFloat8Linear, LoraLinear

try:
    import fp8_triton
except ImportError:  # no Triton
    fp8_triton = None

NAME = "fp8_products"
MATRICES = {  # of Qwen3-8B: output and input features
    "q/o_proj": (4096, 4096),
    "k/v_proj": (1024, 4096),
    "gate/up_proj": (12288, 4096),
    "down_proj": (4096, 12288),
}
TINY_MATRICES = {"q/o_proj": (32, 32), "down_proj": (32, 64)}
LAYER = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 128}  # fmt: skip
TINY_LAYER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 16}  # fmt: skip
COPIES = 6  # of each weight, used in turn
REPEATS = 20
REPEATS_A_COMPILATION = 5


def record(**line) -> None:
    append_result(NAME, line)


def make_layer(matrix: tuple[int, int], product: str, seed: int = 0) -> tuple[Float8Linear, Tensor]:
    """An fp8 layer, and its weight in bf16 before it was quantised."""
    outputs, inputs = matrix
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weight = 0.02 * torch.randn(outputs, inputs, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    layer = Float8Linear(inputs, outputs, False, torch.bfloat16, DEVICE)
    values, scales = quantise_rows(weight)
    layer.weight, layer.weight_scale = (nn.Parameter(x, requires_grad=False) for x in (values, scales))
    layer.product = product
    return layer, weight


def noise(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)


def extreme_rows(rows: int, columns: int) -> Tensor:
    """Noise whose first rows are zeros, tiny, huge, or have one huge value."""
    x = torch.randn(rows, columns, device=DEVICE)
    x[1] = 0
    x[2] *= 1e-6
    x[3, columns // 2] = 1e4
    x[4] = 1e-12 * x[5]
    x[6] = 1e4
    return x.to(torch.bfloat16)


def each_us(call: Callable, weights: list) -> float:
    """Microseconds of one call, mean over the weights."""

    def all_of_them() -> None:
        for weight in weights:
            call(weight)

    return round(microseconds(all_of_them) / len(weights), 1)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def time_products(what: dict, matrix: tuple[int, int], tokens: int, product: str) -> None:
    outputs, inputs = matrix
    x, grad = noise(tokens, inputs), noise(tokens, outputs)
    made = [make_layer(matrix, product, seed) for seed in range(COPIES)]
    weights, layers = [weight for _, weight in made], [layer for layer, _ in made]
    chosen = PRODUCTS[product]

    def forward(layer: Float8Linear, function: Callable) -> Tensor:
        return function(x, layer.weight, layer.weight_scale)

    def backward(layer: Float8Linear, function: Callable) -> Tensor:
        return function(grad, layer.weight, layer.weight_scale)

    torch._dynamo.reset()  # it refuses to compile a function for more than a few shapes
    compiled = (
        torch.compile(lambda *given: chosen.forward(*given), fullgraph=True, dynamic=False),
        torch.compile(lambda *given: chosen.input_gradient(*given), fullgraph=True, dynamic=False),
    )
    eager = chosen.forward, chosen.input_gradient
    ways: dict[str, tuple[Callable, Callable, list]] = {
        "bf16": (lambda weight: x @ weight.t(), lambda weight: grad @ weight, weights)
    }
    for how, (of_x, of_grad) in {"eager": eager, "compiled": compiled}.items():
        ways[f"{product} {how}"] = partial(forward, function=of_x), partial(backward, function=of_grad), layers
    for way, (run_forward, run_backward, given) in ways.items():
        with failure_recorded(NAME, **what, way=way):
            times = {"forward_us": each_us(run_forward, given), "input_gradient_us": each_us(run_backward, given)}
            record(**what, way=way, **times)


def product_pieces(x: Tensor) -> dict[str, Callable[[Float8Linear], object]]:
    """Products of x, quantised before, with a layer's weight."""
    values, scales = quantise_rows(x)
    one = torch.ones((), device=DEVICE)

    def scaled(layer: Float8Linear, rowwise: bool, fast: bool) -> Tensor:
        scale_a, scale_b = (scales, layer.weight_scale.t()) if rowwise else (one, one)
        return torch._scaled_mm(
            values, layer.weight.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    found: dict[str, Callable[[Float8Linear], object]] = {}
    for rowwise, fast in itertools.product((True, False), (False, True)):
        name = f"product {'row-wise' if rowwise else 'tensor-wise'}{', fast accumulation' if fast else ''}"
        found[name] = partial(scaled, rowwise=rowwise, fast=fast)
    tensorwise = PRODUCTS[TENSORWISE].multiply
    found["product tensor-wise, scales outside"] = lambda layer: tensorwise(
        values, scales, layer.weight, layer.weight_scale
    )
    return found | {"product bf16": lambda layer: x @ layer.bf16.t()}


def other_pieces(x: Tensor) -> dict[str, Callable[[Float8Linear], object]]:
    """Quantising x, and transposing a layer's weight."""

    def transposed(weight: Tensor) -> Tensor:
        return weight.t().contiguous()

    torch._dynamo.reset()
    quantise_compiled = torch.compile(lambda x: quantise_rows(x), dynamic=False)
    transposed_compiled = torch.compile(lambda weight: transposed(weight), dynamic=False)
    found = {
        "quantise eager": lambda layer: quantise_rows(x),
        "quantise Inductor": lambda layer: quantise_compiled(x),
        "transpose eager": lambda layer: transposed(layer.weight),
        "transpose Inductor": lambda layer: transposed_compiled(layer.weight),
        "transpose eager, bf16": lambda layer: transposed(layer.bf16),
    }
    if fp8_triton is not None and DEVICE.type == "cuda":
        found |= {
            "quantise Triton": lambda layer: fp8_triton.quantise_rows(x),
            "transpose Triton 64": lambda layer: fp8_triton.transposed(layer.weight, 64),
            "transpose Triton 128": lambda layer: fp8_triton.transposed(layer.weight, 128),
        }
    return found


def time_pieces(what: dict, matrix: tuple[int, int], tokens: int) -> None:
    x = noise(tokens, matrix[1])
    layers = [make_layer(matrix, DEQUANTISED, seed)[0] for seed in range(COPIES)]
    for layer in layers:
        layer.bf16 = dequantise(layer.weight, layer.weight_scale, torch.bfloat16)
    for piece, call in (product_pieces(x) | other_pieces(x)).items():
        with failure_recorded(NAME, **what, piece=piece):
            record(**what, piece=piece, us=each_us(call, layers))
    if fp8_triton is not None and DEVICE.type == "cuda":
        with failure_recorded(NAME, **what, piece="Triton equals eager"):
            record(**what, piece="Triton equals eager", **triton_equal(x, layers[0].weight))


def triton_equal(x: Tensor, weight: Tensor) -> dict:
    (values, scales), (expected, expected_scales) = fp8_triton.quantise_rows(x), quantise_rows(x)
    return {
        "values": same_bytes(values, expected),
        "differing_values": int((values.view(torch.uint8) != expected.view(torch.uint8)).sum()),
        "scales": torch.equal(scales, expected_scales),
        "transposed": same_bytes(fp8_triton.transposed(weight), weight.t().contiguous()),
    }


def relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Of each row that is not 0: norm of the difference by that of the row."""
    size = expected.norm(dim=-1)
    return ((found.float() - expected).norm(dim=-1) / size)[size > 0]


def fast_accumulation(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    return torch._scaled_mm(
        a, b.t(), scale_a=a_scales, scale_b=b_scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def compare_errors(what: dict, matrix: tuple[int, int], tokens: int) -> None:
    layer, weight = make_layer(matrix, DEQUANTISED)
    outputs, inputs = matrix
    x, grad = extreme_rows(tokens, inputs), extreme_rows(tokens, outputs)
    of_weights = x.float() @ weight.float().t(), grad.float() @ weight.float()
    quantised_x = dequantise(*quantise_rows(x), torch.float32)
    quantised_grad = dequantise(*quantise_rows(grad * layer.weight_scale.t()), torch.float32)
    of_quantised = (
        quantised_x @ dequantise(layer.weight, layer.weight_scale, torch.float32).t(),
        quantised_grad @ layer.weight.float(),
    )
    fast = {f"{ROWWISE}, fast accumulation": fp8.Product(fast_accumulation, None)}
    for way, product in (PRODUCTS | fast).items():
        with failure_recorded(NAME, **what, way=way):
            given = layer.weight, layer.weight_scale
            found = product.forward(x, *given), product.input_gradient(grad, *given)
            line = {}
            for name, got, right, quantised in zip(
                ("forward", "input_gradient"), found, of_weights, of_quantised, strict=True
            ):
                by_row = relative_errors(got, quantised)
                line[name] = {
                    "of_weights": float(relative_errors(got, right).median()),
                    "of_quantised": float(by_row.median()),
                    "worst_of_quantised": float(by_row.max()),
                    "finite": bool(torch.isfinite(got).all()),
                }
            record(**what, way=way, **line)


def repeat_check(what: dict, matrix: tuple[int, int], tokens: int, product: str) -> None:
    rows = tokens - 7  # no multiple of any tile
    what = what | {"tokens": rows}
    for way in dict.fromkeys((product, TENSORWISE, DEQUANTISED)):
        with failure_recorded(NAME, **what, way=way):
            layer, _ = make_layer(matrix, way)
            case = Case(what["matrix"], layer, rows, torch.bfloat16)
            faults = [fault_of(PRODUCTS[way], case) for _ in range(REPEATS)]
            record(**what, way=way, of=REPEATS, faults=[fault.what for fault in faults if fault])


def passes(matrix: tuple[int, int], tokens: int, product: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Result and input gradient of compiled passes with extreme rows, each with another weight."""
    outputs, inputs = matrix
    for seed in range(REPEATS):
        if seed % REPEATS_A_COMPILATION == 0:
            torch._dynamo.reset()
        layer, _ = make_layer(matrix, product, seed)
        with_neighbours = torch.compile(
            lambda x, layer=layer: nn.functional.silu(layer(x * 1.0)), fullgraph=True, dynamic=False
        )
        x = extreme_rows(tokens, inputs).requires_grad_()
        y = with_neighbours(x)
        yield y.detach(), torch.autograd.grad(y, x, extreme_rows(tokens, outputs))[0]


def repeat_passes(what: dict, matrix: tuple[int, int], tokens: int, product: str) -> None:
    way = f"{product} compiled"
    with failure_recorded(NAME, **what, way=way):
        not_finite = {"forward": 0, "input_gradient": 0}
        for pair in passes(matrix, tokens, product):
            for name, result in zip(not_finite, pair, strict=True):
                not_finite[name] += not bool(torch.isfinite(result).all())
        record(**what, way=way, of=REPEATS, not_finite=not_finite)


def compare_capture(what: dict, matrix: tuple[int, int], tokens: int) -> None:
    outputs, inputs = matrix
    layer, _ = make_layer(matrix, what["way"])
    values, grad = extreme_rows(tokens, inputs), extreme_rows(tokens, outputs)

    def step(x: Tensor) -> list[Tensor]:
        y = layer(x)
        return [y.detach(), torch.autograd.grad(y, x, grad)[0]]

    expected = step(values.clone().requires_grad_())
    stream = new_stream()
    with torch.cuda.stream(stream):
        x = values.clone().requires_grad_()
    graph, found = captured(partial(step, x), stream=stream)
    graph.replay()
    wait()
    record(**what, tokens=tokens, same_bits=[torch.equal(a, b) for a, b in zip(expected, found, strict=True)])


def decoder_layer(config: Qwen3Config, way: str) -> Qwen3DecoderLayer:
    """With LoRA on all linears, whose frozen weights are in bf16, or in fp8 with the product `way`."""
    with torch.device(DEVICE):
        layer = Qwen3DecoderLayer(config, 0).to(torch.bfloat16).requires_grad_(False)
    for parent in (layer.self_attn, layer.mlp):
        linears = {name: child for name, child in parent.named_children() if isinstance(child, nn.Linear)}
        for name, linear in linears.items():
            base, kind = linear, LoraLinear
            if way != "bf16":
                base, kind = make_layer((linear.out_features, linear.in_features), way)[0], LoraFloat8Linear
            adapted = kind(base, "default", config=LoraConfig(r=16, lora_alpha=32), r=16, lora_alpha=32)
            for part in (adapted.lora_A, adapted.lora_B):
                part.float().to(DEVICE)
            setattr(parent, name, adapted)
    return layer


def time_layer(what: dict, tokens: int, sizes: dict[str, int]) -> None:
    torch._dynamo.reset()
    forget_peak_memory()
    torch.manual_seed(0)
    config = Qwen3Config(**sizes, num_hidden_layers=1, vocab_size=128, attn_implementation="sdpa")
    layer = decoder_layer(config, what["way"])
    x = noise(tokens, sizes["hidden_size"])[None].requires_grad_()
    grad = torch.randn_like(x)
    positions = Qwen3RotaryEmbedding(config).to(DEVICE)(x, torch.arange(tokens, device=DEVICE)[None])
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    compiled = torch.compile(layer, dynamic=False)

    def step() -> tuple[Tensor, ...]:
        y = compiled(x, position_embeddings=positions)
        return torch.autograd.grad(y[0] if isinstance(y, tuple) else y, leaves, grad)

    begun = time.perf_counter()
    step()
    wait()
    first_call_s = round(time.perf_counter() - begun, 1)
    ms = round(microseconds(step) / 1e3, 3)
    finite = all(bool(torch.isfinite(gradient).all()) for gradient in step())
    record(**what, ms=ms, first_call_s=first_call_s, peak_gib=peak_gib(), finite=finite)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("product", "pieces", "errors", "repeats", "layer", "capture")
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--tiny", action="store_true", help="small matrices, 64 tokens")
    args = parser.parse_args()
    matrices, tokens = (TINY_MATRICES, [64]) if args.tiny else (MATRICES, args.tokens)
    capability = torch.cuda.get_device_capability() if DEVICE.type == "cuda" else None
    product = ROWWISE if capability is None else fp8.product_for(capability, 4096, 4096)
    by_part: dict[str, list[Callable]] = {
        "product": [partial(time_products, product=product)],
        "pieces": [time_pieces],
        "errors": [compare_errors],
        "repeats": [partial(repeat_check, product=product), partial(repeat_passes, product=product)],
    }
    for part in (part for part in by_part if part in args.part):
        counts = tokens if part in ("product", "pieces") else tokens[:1]
        for (name, matrix), count, measure in itertools.product(matrices.items(), counts, by_part[part]):
            what = {"part": part, "matrix": name, "tokens": count}
            with failure_recorded(NAME, **what):
                measure(what, matrix, count)
    if "layer" in args.part:
        for count, way in itertools.product(tokens, ("bf16", product)):
            what = {"part": "layer", "way": way, "tokens": count}
            with failure_recorded(NAME, **what):
                time_layer(what, count, TINY_LAYER if args.tiny else LAYER)
    if "capture" in args.part and DEVICE.type == "cuda":  # last: a capture that fails can leave the device unusable
        for way in dict.fromkeys((product, TENSORWISE, DEQUANTISED)):
            with failure_recorded(NAME, part="capture", way=way):
                compare_capture({"part": "capture", "way": way}, matrices["q/o_proj"], tokens[0])


if __name__ == "__main__":
    main()
