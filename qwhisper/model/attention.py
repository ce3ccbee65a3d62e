"""Attention implementations for transformers' registry, each a choice of kernels for packed rows and padded batches.

Samples lie end to end in a packed row; `cu_seq_lens_q` marks where each begins and ends, and attention never crosses.
On CUDA a call that brings a table of the segments uses the kernels of `model.segment_attention`, if they can run there;
another uses `torch.nn.attention.varlen`. If that cannot run (CPU, fp32, dropout, heads wider than 256) the same result
comes from one SDPA call a segment. A call without `cu_seq_lens_q` (generation, padded batches) is transformers' own
SDPA, with its mask. A configuration names its implementation, so two models may use different kernels; a kernel that is
found wrong for one model (`engine.kernels.check_kernels`) is replaced in that model's configurations alone.

cuDNN's attention is left out of each call: its masked backward gives NaN in grad_q where length % 128 = 64 and a row's
log-sum-exp is under -88.7 (pytorch#196678), and on some cards gradients that are wrong by up to 960 times. The choice
in the forward pass fixes the kernel of the backward pass.
"""

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qwhisper.model.segment_attention import segment_attention, segments_can_run

PACKED_ATTENTION = "qwhisper_packed"
PACKED_VARLEN = "qwhisper_packed_varlen"
PACKED_SDPA = "qwhisper_packed_sdpa"
PACKED_MATH = "qwhisper_packed_math"
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_SWITCHES = threading.Lock()  # torch's switches for SDPA's backends belong to the whole process


def without_cudnn(attend: Callable) -> Callable:
    """`attend`, during which torch's SDPA cannot choose cuDNN; its other backends stay as the process has them."""

    @functools.wraps(attend)
    def guarded(*args, **kwargs):
        if torch.compiler.is_compiling():  # the backend is chosen while tracing; Dynamo traces this form alone
            with sdpa_kernel(NOT_CUDNN):
                return attend(*args, **kwargs)
        with _SWITCHES:
            before = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)  # 1 µs; `sdpa_kernel` takes 30
            try:
                return attend(*args, **kwargs)
            finally:
                torch.backends.cuda.enable_cudnn_sdp(before)

    return guarded


def math_alone(attend: Callable) -> Callable:
    """`attend` with torch's SDPA as separate matrix products and softmax, in fp32: slow, but right wherever those are
    right.
    """

    @functools.wraps(attend)
    def guarded(*args, **kwargs):
        if torch.compiler.is_compiling():
            with sdpa_kernel(SDPBackend.MATH):
                return attend(*args, **kwargs)
        with _SWITCHES, sdpa_kernel(SDPBackend.MATH):
            return attend(*args, **kwargs)

    return guarded


def attention_for(text_config: PreTrainedConfig) -> str:
    """The attention implementation for a language model: ours, or eager for one whose scores are soft-capped."""
    return PACKED_ATTENTION if getattr(text_config, "attn_logit_softcapping", None) is None else "eager"


def text_attention(config: PreTrainedConfig) -> str:
    """The attention that a language model's layers use: ours if none is set, or "sdpa", which would call cuDNN."""
    requested = config._attn_implementation
    return attention_for(config) if requested in (None, "sdpa") else requested


def encoder_attention(config: PreTrainedConfig) -> str:
    """The attention that an encoder's layers use: eager, or ours: with another, windows in a row would see each other.

    With eager the encoder lays its windows into a padded batch.
    """
    requested = config._attn_implementation
    return requested if requested in IMPLEMENTATIONS or requested == "eager" else PACKED_ATTENTION


class LayerConfig:
    """A configuration as its attention layers see it: `choose(configuration)` is their attention implementation.

    So the configuration itself keeps the name that a user has set, and no setting reaches another kernel. All other
    attributes are the configuration's.
    """

    def __init__(self, config: PreTrainedConfig, choose: Callable[[PreTrainedConfig], str]):
        self._config, self._choose = config, choose

    @property
    def _attn_implementation(self) -> str:
        return self._choose(self._config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_choose"):  # while it is copied it has neither
            raise AttributeError(name)
        return getattr(self._config, name)


def choose_attention(part: PreTrainedModel, choose: Callable[[PreTrainedConfig], str]) -> None:
    """Let `choose` name the attention of the layers of a language model or encoder, whatever its configuration says."""
    for module in part.modules():
        if not isinstance(module, PreTrainedModel) and getattr(module, "config", None) is part.config:
            module.config = LayerConfig(part.config, choose)


def packed_row_mask(hidden_states: Tensor) -> Tensor:
    """The 4-D stand-in that tells transformers' mask creation to make none for a packed row.

    A 4-D mask is passed through untouched by every model; without it a mask of tokens × tokens would be built and
    thrown away.
    """
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=hidden_states.device)


def _segments(
    query, key, value, cu_seq_lens, max_length, *, scale, causal, window, dropout, cu_seq_lens_host=None,
    segment_blocks=None,
) -> Tensor:  # fmt: skip
    """As `_varlen`. segment_blocks: the table of `model.segment_blocks`, which takes the place of the borders."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return segment_attention(query, key, value, segment_blocks, scale, causal, window or 0)[0]


def varlen_keywords(num_key_value_groups: int) -> dict:
    """torch 2.11 repeats key heads without being asked; from 2.12 on `enable_gqa` must ask for it."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if num_key_value_groups > 1 and _takes_gqa(varlen_attn) else {}


@functools.cache  # called by each layer in each step: 0.05 to 0.16 ms [measured]
def _takes_gqa(varlen: Callable) -> bool:
    return "enable_gqa" in inspect.signature(varlen).parameters


def _varlen(
    query, key, value, cu_seq_lens, max_length, *, scale, causal, window, dropout, cu_seq_lens_host=None,
    segment_blocks=None,
) -> Tensor:  # fmt: skip
    """[1, heads, tokens, head_dim] each, bf16 or fp16 on CUDA, dropout 0. Returns [tokens, heads, head_dim]."""
    from torch.nn.attention.varlen import varlen_attn

    left = window - 1 if window else -1
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens,
        cu_seq_lens,
        max_length,
        max_length,
        scale=scale,
        window_size=(left, 0 if causal else -1),
        **varlen_keywords(query.shape[1] // key.shape[1]),
    )
    assert isinstance(out, Tensor)  # a pair only if return_aux asks for one
    return out


def _segment_mask(length: int, window: int | None, device) -> Tensor | None:
    """[length, length], True where a query may look; None if plain causal attention gives the same."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _sdpa_per_segment(
    query, key, value, cu_seq_lens, max_length, *, scale, causal, window, dropout, cu_seq_lens_host=None,
    segment_blocks=None,
) -> Tensor:  # fmt: skip
    """The same result as `_varlen`, slower. Without `cu_seq_lens_host` it waits for the device to read the borders."""
    bounds = cu_seq_lens.tolist() if cu_seq_lens_host is None else cu_seq_lens_host
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    outputs = []
    for start, end in itertools.pairwise(bounds):
        if start == end:  # an unused border
            continue
        mask = _segment_mask(end - start, window, query.device) if causal else None
        out = nn.functional.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            scale=scale,
        )
        outputs.append(out)
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def _sdpa(*args, **kwargs) -> Tensor:
    return sdpa_attention_forward(*args, **kwargs)[0]


# By kind, a kernel and its fallbacks: the first that runs is used. All of a kind compute the same.
PACKED_KERNELS = {
    "segments": _segments,
    "varlen": _varlen,
    "sdpa_per_segment": without_cudnn(_sdpa_per_segment),
    "math_per_segment": math_alone(_sdpa_per_segment),
}
PADDED_KERNELS = {"sdpa": without_cudnn(_sdpa), "math": math_alone(_sdpa)}


@dataclass(frozen=True)
class Kernels:
    """The kernels for packed rows and for padded batches; if one cannot run, the next in its table is used."""

    packed: str
    padded: str


PACKED_NAMES = (PACKED_ATTENTION, PACKED_VARLEN, PACKED_SDPA, PACKED_MATH)
IMPLEMENTATIONS = {
    name + suffix: Kernels(packed, padded)
    for name, packed in zip(PACKED_NAMES, PACKED_KERNELS, strict=True)
    for suffix, padded in zip(("", "_padded_math"), PADDED_KERNELS, strict=True)
}


def next_kernel(name: str) -> str | None:
    """The kernel that takes the place of one that is wrong; None for the last of its table."""
    names = list(PACKED_KERNELS if name in PACKED_KERNELS else PADDED_KERNELS)
    return next(iter(names[names.index(name) + 1 :]), None)


def with_kernel(implementation: str, kernel: str) -> str:
    """The implementation that uses `kernel` for its kind of rows, and is otherwise the same."""
    kind = "packed" if kernel in PACKED_KERNELS else "padded"
    wanted = replace(IMPLEMENTATIONS[implementation], **{kind: kernel})
    return next(name for name, kernels in IMPLEMENTATIONS.items() if kernels == wanted)


def varlen_can_run(query: Tensor, dropout: float) -> bool:
    """Whether `torch.nn.attention.varlen` takes these tensors; otherwise one SDPA call a segment does the same."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and dropout == 0 and query.shape[-1] <= 256


def packed_kernel(implementation: str, query: Tensor, dropout: float = 0.0, *, has_blocks: bool) -> str:
    """Which of PACKED_KERNELS attends over packed rows of such queries. has_blocks: the call has `segment_blocks`."""
    kernel = IMPLEMENTATIONS[implementation].packed
    if kernel == "segments" and not (has_blocks and segments_can_run(query, dropout)):
        kernel = "varlen"
    return "sdpa_per_segment" if kernel == "varlen" and not varlen_can_run(query, dropout) else kernel


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    cu_seq_lens_host: Sequence[int] | None = None,
    segment_blocks: Tensor | None = None,
    implementation: str = PACKED_ATTENTION,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query [batch, heads, tokens, head_dim]; key and value have their own heads.

    cu_seq_lens_q: [segments + 1] int32 borders of the segments of a packed row (batch 1); None for an ordinary batch.
    cu_seq_lens_host: the same numbers on the CPU, which save the kernels by segment a wait for the device.
    segment_blocks: the table of `model.segment_blocks` for these borders, on the device.
    implementation: which of IMPLEMENTATIONS.
    Returns ([batch, tokens, heads, head_dim], None).
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        # SDPA would silently ignore them.
        raise ValueError(
            f"{PACKED_ATTENTION} knows neither soft-capping nor sinks: use attn_implementation='eager' and padded "
            "batches, as `qwhisper train` does by itself for a model with soft-capped scores"
        )
    if cu_seq_lens_q is None:
        keywords = {"scaling": scaling, "is_causal": is_causal, **kwargs}
        attend = PADDED_KERNELS[IMPLEMENTATIONS[implementation].padded]
        return attend(module, query, key, value, attention_mask, dropout, **keywords), None
    attend = PACKED_KERNELS[packed_kernel(implementation, query, dropout, has_blocks=segment_blocks is not None)]
    out = attend(
        query,
        key,
        value,
        cu_seq_lens_q,
        max_length_q,
        scale=scaling,
        causal=module.is_causal if is_causal is None else is_causal,
        window=sliding_window,
        dropout=dropout,
        cu_seq_lens_host=cu_seq_lens_host,
        segment_blocks=segment_blocks,
    )
    return out[None], None


for _name in IMPLEMENTATIONS:
    AttentionInterface.register(_name, functools.partial(packed_attention_forward, implementation=_name))
    AttentionMaskInterface.register(_name, sdpa_mask)  # without it transformers would make no mask at all
