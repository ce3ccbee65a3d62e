"""Estimates how fast a training is on known cards: arithmetic that a sample needs ÷ what a card achieves.

An estimate, not a promise: the shares are those of benchmarks/results/throughput.jsonl (H200), and a host with slow
cores launches kernels more slowly.
"""

import math
import re
from dataclasses import dataclass

from qwhisper.data.row_sizes import Rows
from qwhisper.engine.plan_memory import Execution, Job


@dataclass(frozen=True, kw_only=True)
class Card:
    """gib: nominal memory. tflops: dense bf16 (fp16 on a T4) with fp32 sums, by the maker's data sheet. has_fp8: matrix
    products in fp8.
    """

    name: str
    gib: float
    tflops: float
    has_fp8: bool = False


CARDS = (
    Card(name="T4", gib=15, tflops=65),
    Card(name="RTX 3090", gib=24, tflops=71),
    Card(name="L4", gib=22.5, tflops=121, has_fp8=True),
    Card(name="RTX 4090", gib=24, tflops=165, has_fp8=True),
    Card(name="RTX 5090", gib=31.8, tflops=210, has_fp8=True),
    Card(name="A100 80GB", gib=79, tflops=312),
    Card(name="H100", gib=79.6, tflops=989, has_fp8=True),
    Card(name="H200", gib=140, tflops=989, has_fp8=True),
)
NARROW, WIDE = 1024, 4096  # hidden sizes at which the shares below were measured; between them they are interpolated
# Share of `tflops` that the matrix products and everything between them achieve in a large pack.
SHARES: dict[Execution, tuple[float, float]] = {
    "plain": (0.18, 0.33),
    "compiled": (0.34, 0.40),
    "captured": (0.34, 0.40),
}
HALF_SHARE = 850  # tokens of a pack that achieves half of it at hidden size NARROW; less with the square of the size
# Seconds to launch a layer of the LM and the encoder's share that goes with it, forward and backward.
LAUNCHES_S: dict[Execution, float] = {"plain": 8e-3, "compiled": 4e-3, "captured": 0.0}
WEIGHTS_GAIN = {"fp8": 1.5, "nf4": 0.9}
DEQUANTISED = 300  # tokens whose arithmetic takes as long as dequantising NF4's weights once a pack and direction


def flops_a_row(job: Job, rows: Rows, recompute_layers: int = 0) -> float:
    """Operations for one row, a multiply-add as two: forward 2 a weight and token, the gradient of the input as many,
    that of a trained weight as many again; a recomputed layer once more. The frozen encoder has no backward pass.
    """
    text, audio = job.text, job.audio
    again = recompute_layers / text.layers
    frozen = (4 + 2 * again) * text.linear_parameters * rows.tokens
    lora = (6 + 2 * again) * job.lora_parameters * rows.tokens
    attention = (3 + again) * 2 * text.query_width * rows.tokens**2 * text.layers
    head = 4 * text.vocabulary * text.hidden * rows.supervised
    projector = 6 * job.projector_parameters * rows.audio_tokens
    passes = 2 if job.freeze_whisper else 6
    encoder = passes * (audio.layer_parameters + 2 * audio.convolution_parameters) * rows.frames
    encoder += 2 * passes * audio.width * audio.layers * rows.frames**2
    teacher = (2 * text.linear_parameters + text.vocabulary * text.hidden) * rows.supervised if job.distils else 0.0
    return frozen + lora + attention + head + projector + encoder + 2 * teacher


def samples_a_second(
    job: Job, rows: Rows, tokens: int, recompute_layers: int, card: Card, samples_per_step: int, num_gpus: int = 1
) -> float:
    """tokens: of the largest pack. samples_per_step: of one card. Several cards share the data, each with the whole
    model.
    """
    job = job.computing_again(recompute_layers)
    rows_a_pack = samples_per_step / min(samples_per_step, rows.packs(samples_per_step, tokens))
    share = _share(job, rows_a_pack * rows.tokens)
    arithmetic = flops_a_row(job, rows, recompute_layers) / (card.tflops * 1e12 * share)
    launches = job.text.layers * LAUNCHES_S[job.execution] / rows_a_pack
    # The host prepares the next kernels while the card works: the slower of both governs, and near a tie both do.
    return num_gpus / math.hypot(arithmetic, launches)


def _share(job: Job, tokens: float) -> float:
    narrow, wide = SHARES[job.execution]
    position = math.log(job.text.hidden / NARROW) / math.log(WIDE / NARROW)
    large = (narrow + (wide - narrow) * min(1.0, max(0.0, position))) * WEIGHTS_GAIN.get(job.weights, 1.0)
    lost = HALF_SHARE * (NARROW / job.text.hidden) ** 2 + (DEQUANTISED if job.weights == "nf4" else 0)
    return large * tokens / (tokens + lost)


def card_called(device_name: str, gib: float) -> Card:
    """The known card of that name, as the driver gives it; else `card_like`."""
    named = [card for card in CARDS if re.search(rf"\b{card.name.split(' 80')[0]}\b", device_name)]
    return named[0] if named else card_like(gib)


def card_like(gib: float) -> Card:
    """The known card whose memory is nearest; of two the faster."""
    return min(CARDS, key=lambda card: (round(abs(card.gib - gib)), -card.tflops))
