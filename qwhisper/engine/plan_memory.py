"""Memory of a training by part, computed from sizes alone: what a card must hold, without loading anything.

Everything is counted in bytes. The total is PyTorch's `max_memory_reserved`; the CUDA context, which the driver holds
beside it, stands apart (`CONTEXT`). The figures per token and layer count what autograd keeps (`saved_per_token`); the
constants below them are fitted to the measured peaks in benchmarks/results (docs/performance.md, "Planning").
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from qwhisper.data.row_sizes import Rows
from qwhisper.engine.plan_sizes import AudioSize, TextSize
from qwhisper.model.loss import MAX_LOGITS_AT_ONCE

GIB = 2**30
Weights = Literal["fp32", "fp16", "bf16", "fp8", "nf4"]
Execution = Literal["plain", "compiled", "captured"]
CONTEXT = GIB // 2  # of the driver, cuBLAS and the kernels' code: outside PyTorch's allocator
WORKSPACE = 150 * 2**20  # cuBLAS and the allocator's smallest blocks
LOST_SHARE = 0.03  # of what comes and goes: the allocator's blocks don't fit each other exactly
BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
# A linear layer's weight in these formats, in bytes a parameter: NF4 has a scale of 8 bits for 64 weights, and one of
# 32 bits for 256 of them; fp8 one of 32 bits a row, which is next to nothing.
QUANTISED = {"fp8": 1.001, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
TRAINED = 4 * 4  # an fp32 weight with its gradient and AdamW's two moments


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained and how, as far as memory depends on it.

    weights: number format of the LM's linears; the rest of the frozen models is in `dtype`. lora_r: 0 without LoRA.
    lora_targets: names of the linears with an adapter; None: all. distils: a teacher reads the words. dropout: in the
    LM. execution: of packs, but see `computing_again`.
    """

    text: TextSize
    audio: AudioSize
    weights: Weights = "bf16"
    dtype: Literal["fp32", "fp16", "bf16"] = "bf16"
    lora_r: int = 16
    lora_targets: tuple[str, ...] | None = None
    lora_fp32: bool = True
    projector_fp32: bool = True
    projector_stack: int = 4
    freeze_whisper: bool = True
    whisper_cpu: bool = False
    distils: bool = False
    dropout: bool = False
    execution: Execution = "plain"

    @property
    def adapted(self) -> dict[str, tuple[int, int]]:
        """The linears of a layer with an adapter."""
        if not self.lora_r:
            return {}
        return {n: s for n, s in self.text.linears.items() if self.lora_targets is None or n in self.lora_targets}

    @property
    def lora_parameters(self) -> int:
        return self.text.layers * self.lora_r * sum(map(sum, self.adapted.values()))

    @property
    def projector_parameters(self) -> int:
        """Its norm, two linears with biases."""
        stacked, hidden = self.audio.width * self.projector_stack, self.text.hidden
        return 2 * stacked + (stacked + 1) * hidden + (hidden + 1) * hidden

    def computing_again(self, recompute_layers: int) -> "Job":
        """As it runs with so many layers computed again: plain if these have dropout, see `engine.plain`."""
        return replace(self, execution="plain") if self.dropout and recompute_layers else self


@dataclass(frozen=True, kw_only=True)
class PackSize:
    """One pack. frames: encoder frames, silence included. audio_tokens: frames of speech ÷ projector_stack."""

    tokens: int
    supervised: int
    audio_tokens: int
    frames: int


def pack_of(rows: Rows, tokens: int) -> PackSize:
    """A pack of so many tokens, with the mean shares of everything else."""
    share = tokens / rows.tokens
    return PackSize(
        tokens=tokens,
        supervised=math.ceil(rows.supervised * share),
        audio_tokens=math.ceil(rows.audio_tokens * share),
        frames=math.ceil(rows.frames * share),
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by part: `parts` add up to what PyTorch reserves."""

    parts: dict[str, int]

    @property
    def reserved(self) -> int:
        return sum(self.parts.values())

    @property
    def on_card(self) -> int:
        return self.reserved + CONTEXT


def memory_of(job: Job, pack: PackSize, recompute_layers: int) -> Memory:
    """The peak of a step over packs of this size. recompute_layers: first layers of the LM whose activations the
    backward pass computes again.
    """
    job = job.computing_again(recompute_layers)
    kept = activations(job, pack, recompute_layers)
    temporary = largest_temporary(job, pack, recompute_layers)
    parts = {
        "language model": language_model(job),
        "encoder": encoder(job),
        "projector, gradients, moments": _trained(job.projector_parameters, job.projector_fp32),
        "LoRA, gradients, moments": _trained(job.lora_parameters, job.lora_fp32),
        "activations": kept,
        "logits and other temporaries": temporary,
        "evaluations beside graphs": round(_beside_graphs(job, pack)),
        "allocator": WORKSPACE + round(LOST_SHARE * (kept + temporary)),
    }
    return Memory(parts={name: size for name, size in parts.items() if size})


def language_model(job: Job) -> int:
    text = job.text
    linear = QUANTISED.get(job.weights) or BYTES[job.weights]
    return round(text.linear_parameters * linear + (text.parameters - text.linear_parameters) * BYTES[job.dtype])


def encoder(job: Job) -> int:
    if job.whisper_cpu:
        return 0
    return round(job.audio.parameters * (BYTES[job.dtype] if job.freeze_whisper else TRAINED))


def _trained(parameters: int, fp32: bool) -> int:
    return parameters * (TRAINED if fp32 else TRAINED // 2)


def saved_per_token(job: Job) -> float:
    """Bytes that autograd keeps of one layer for one token.

    Plain: both norms and the norms of queries and keys keep an fp32 copy of their input; attention keeps its queries,
    keys, values and result; the gated feed-forward keeps four rows of its width. An adapter keeps its linear's input.
    Compiled, with operations that cost little computed again: the layer's input and the results of its matrix products
    and of attention, in the compute dtype. For Qwen3-8B this is the 189 MiB measured for a layer at 2048 tokens.
    """
    text, size = job.text, BYTES[job.dtype]
    hidden, wide, queries, keys = text.hidden, text.intermediate, text.query_width, text.key_width
    adapted = job.adapted
    log_sums, of_heads = 4 * text.heads, 4 * (text.heads + text.key_heads) if text.norms_heads else 0
    rest = len(adapted) * job.lora_r * size + log_sums + of_heads
    attention = (2 * queries + 2 * keys) * size
    if job.execution != "plain":
        before_norms = (queries + keys) * size if text.norms_heads else 0
        return attention + before_norms + (2 * hidden + 2 * wide) * size + rest
    normed = sum(bool(adapted.keys() & part) for part in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}))
    in_fp32 = 2 * hidden + (queries + keys if text.norms_heads else 0) + 2  # the 2: a factor of each norm
    return 4 * in_fp32 + attention + (normed * hidden + (3 + ("down_proj" in adapted)) * wide) * size + rest


def activations(job: Job, pack: PackSize, recompute_layers: int) -> int:
    """What is kept from the forward pass of a pack when its backward pass begins."""
    text, size = job.text, BYTES[job.dtype]
    whole = text.layers - recompute_layers
    layers = pack.tokens * (whole * saved_per_token(job) + recompute_layers * text.hidden * size)
    cast = 2.0 * job.lora_parameters if job.lora_fp32 and size < 4 else 0.0  # A and B in the compute dtype
    embeddings = 4 * pack.tokens * text.hidden * size
    return round(layers + cast + embeddings + _projector_activations(job, pack) + _encoder_activations(job, pack))


def _projector_activations(job: Job, pack: PackSize) -> float:
    """The stacked frames before and after the norm; the first linear's result before and after its activation."""
    size = 4.0 if job.projector_fp32 else BYTES[job.dtype]
    row = 2 * job.projector_stack * job.audio.width + 3 * job.text.hidden
    return pack.audio_tokens * row * size + pack.frames * job.audio.width * BYTES[job.dtype]


def _encoder_activations(job: Job, pack: PackSize) -> float:
    """Of a trained encoder, in fp32: norms, queries, keys, values, result, and the feed-forward twice."""
    if job.freeze_whisper:
        return 0.0
    row = 8 * job.audio.width + 2 * job.audio.feed_forward
    return pack.frames * (job.audio.layers * row + 6 * job.audio.width) * 4.0


def largest_temporary(job: Job, pack: PackSize, recompute_layers: int) -> int:
    """The most that is in use besides, at one of these moments, which don't overlap: the encoder, the loss, the
    backward pass of a layer.
    """
    moments = _encoder_temporary(job, pack), _loss_temporary(job, pack), _layer_temporary(job, pack, recompute_layers)
    return round(max(moments))


def _encoder_temporary(job: Job, pack: PackSize) -> float:
    """A layer without gradients, or the convolutions, which have twice as many rows."""
    if job.whisper_cpu:
        return 0.0
    row = max(7 * job.audio.width + 2 * job.audio.feed_forward, 12 * job.audio.width)
    return pack.frames * row * (BYTES[job.dtype] if job.freeze_whisper else 4.0)


def _loss_temporary(job: Job, pack: PackSize) -> float:
    """Logits of a chunk: in the compute dtype and in fp32, their log-softmax, and a gradient of each of these.
    Compiled, only logits and gradient in the compute dtype.
    """
    plain, with_teacher = (18.0, 34.0) if job.execution == "plain" else (6.0, 10.0)
    return _logits_at_once(job, pack) * (with_teacher if job.distils else plain)


def _logits_at_once(job: Job, pack: PackSize) -> float:
    positions = MAX_LOGITS_AT_ONCE // job.text.vocabulary // (2 if job.distils else 1)
    return min(pack.supervised, positions) * job.text.vocabulary


def _beside_graphs(job: Job, pack: PackSize) -> float:
    """Evaluations run plain, and what graphs hold is no memory for them: a pass without gradients."""
    if job.execution != "captured":
        return 0.0
    layer = pack.tokens * (4 * job.text.intermediate + 4 * job.text.hidden) * BYTES[job.dtype]
    return max(layer, _encoder_temporary(job, pack), 10.0 * _logits_at_once(job, pack))


def _layer_temporary(job: Job, pack: PackSize, recompute_layers: int) -> float:
    """Gradients inside a layer; the layer itself if the last one is computed again; a weight that is dequantised, or
    all of an NF4 layer that is computed again, which keeps them for its gradients.
    """
    text, size = job.text, BYTES[job.dtype]
    gradients = pack.tokens * (3 * text.intermediate + 2 * text.hidden) * size
    again = pack.tokens * saved_per_token(job) if recompute_layers == text.layers else 0.0
    dequantised = 2 * text.hidden * text.intermediate * size if job.weights in ("nf4", "fp8") else 0.0
    if job.weights == "nf4" and recompute_layers:
        dequantised = text.linear_parameters / text.layers * size
    return gradients + again + dequantised


def usable(card_gib: float) -> int:
    """Bytes that PyTorch may reserve on an empty card of this size: without the context and a margin of 4 %, for the
    display, the driver and what a plan can't know. A card of 32 GiB has 30.2.
    """
    return math.floor(card_gib * GIB * 0.96) - CONTEXT
