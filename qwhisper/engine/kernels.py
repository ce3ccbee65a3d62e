"""The attention kernels of a model: tested before a run, reported and replaced if they are wrong."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwhisper.engine.preflight import Attention, Fault, Kernel, Layout, first_fault, trials
from qwhisper.errors import NumericalError
from qwhisper.model import attention as kernels
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.model.segment_blocks import segment_blocks


@dataclass(frozen=True)
class WrongKernel:
    """A wrong kernel. case: attention, batch and scores. what: which tensor was wrong, and by how much."""

    kernel: str
    case: str
    what: str
    replaced_by: str


def check_kernels(
    model: Qwen3AudioForConditionalGeneration, longest: int, before_trial: Callable[[], None] = lambda: None
) -> list[WrongKernel]:
    """Test the kernels that this model's attention uses, on each of its devices, and replace those that are wrong.

    A replacement is set in this model's configurations alone. longest: tokens of the longest row that the run may have.
    before_trial: may raise to end the check. Changes neither weights nor random generators. Raises NumericalError if no
    kernel is right.
    """
    findings: list[WrongKernel] = []
    while (wrong := _first_wrong(model, longest, before_trial)) is not None:
        name, fault = wrong
        replaced_by = kernels.next_kernel(name)
        if replaced_by is None:
            raise NumericalError(
                f"no attention kernel is right on this machine; the last, {name}: {fault.what}; {fault.case}. Update "
                "PyTorch or the driver, or try another --dtype or another card"
            )
        _replace(model, name, replaced_by)
        findings.append(WrongKernel(name, fault.case, fault.what, replaced_by))
    return findings


def _first_wrong(
    model: Qwen3AudioForConditionalGeneration, longest: int, before_trial: Callable[[], None]
) -> tuple[str, Fault] | None:
    """The first kernel in use that is wrong."""
    for attention in attentions(model):
        in_encoder = attention.owner == "encoder"
        tokens = model.config.audio_config.max_source_positions if in_encoder else longest
        for name, kernel, packed in kernels_in_use(attention, implementation_of(attention, model)):
            for case in trials(attention, tokens, packed=packed):
                before_trial()
                if (fault := first_fault(kernel, [case])) is not None:
                    return name, fault
    return None


def _replace(model: Qwen3AudioForConditionalGeneration, wrong: str, right: str) -> None:
    """Replace the kernel in encoder and language model, if they use it."""
    for attention in attentions(model):
        implementation = implementation_of(attention, model)
        if any(name == wrong for name, _, _ in kernels_in_use(attention, implementation)):
            part_of(attention, model).config._attn_implementation = kernels.with_kernel(implementation, right)


def part_of(attention: Attention, model: Qwen3AudioForConditionalGeneration) -> PreTrainedModel:
    """The encoder or the language model, whose configuration names the kernels."""
    return model.model.audio_tower if attention.owner == "encoder" else model.model.language_model


def implementation_of(attention: Attention, model: Qwen3AudioForConditionalGeneration) -> str:
    """Which of our implementations the layers use."""
    choose = kernels.encoder_attention if attention.owner == "encoder" else kernels.text_attention
    return choose(part_of(attention, model).config)


def kernels_in_use(attention: Attention, implementation: str) -> Iterator[tuple[str, Kernel, bool]]:
    """(name, kernel, whether it is for packed rows) of one of our implementations."""
    query = torch.empty(0, attention.head_dim, dtype=attention.dtype, device=attention.device)
    yield (name := kernels.packed_kernel(implementation, query, has_blocks=True)), _packed(name), True
    if attention.owner != "encoder":  # its windows are always packed
        yield (name := kernels.IMPLEMENTATIONS[implementation].padded), _padded(name), False


def _packed(name: str) -> Kernel:
    def kernel(query: Tensor, key: Tensor, value: Tensor, layout: Layout, attention: Attention) -> Tensor:
        borders = [0, *itertools.accumulate(layout.lengths)]
        out = kernels.PACKED_KERNELS[name](
            query,
            key,
            value,
            torch.tensor(borders, dtype=torch.int32, device=attention.device),
            max(layout.lengths),
            scale=attention.scale,
            causal=attention.causal,
            window=attention.window,
            dropout=0.0,
            segment_blocks=segment_blocks(borders).to(attention.device),
        )
        return out[None]

    return kernel


def _padded(name: str) -> Kernel:
    def kernel(query: Tensor, key: Tensor, value: Tensor, layout: Layout, attention: Attention) -> Tensor:
        module = SimpleNamespace(num_key_value_groups=attention.groups, is_causal=attention.causal)
        mask = layout.mask(attention)
        return kernels.PADDED_KERNELS[name](module, query, key, value, mask, scaling=attention.scale)

    return kernel


def attentions(model: Qwen3AudioForConditionalGeneration) -> list[Attention]:
    """Every kind of attention in the model that goes through our kernels."""
    body = model.model
    encoder, config = body.audio_tower, body.config.audio_config
    head_dim = config.d_model // config.encoder_attention_heads
    weight = encoder.conv1.weight
    # Whisper scales its queries before it calls the kernel.
    found = []
    if kernels.encoder_attention(config) in kernels.IMPLEMENTATIONS:
        found += [
            Attention(owner="encoder", groups=1, head_dim=head_dim, scale=1.0, causal=False, window=None,
                      dtype=weight.dtype, device=weight.device, trained=body.encoder_is_trained)
        ]  # fmt: skip
    if kernels.text_attention(body.language_model.config) in kernels.IMPLEMENTATIONS:
        found += _language_model_attentions(body.language_model)
    return found


def _language_model_attentions(language_model) -> list[Attention]:
    embeddings = language_model.get_input_embeddings().weight
    found = []
    for module in language_model.modules():
        if not hasattr(module, "is_causal") or not hasattr(module, "head_dim"):
            continue
        devices = {p.device for p in module.parameters()} - {torch.device("meta")}  # meta: offloaded to the host
        found.append(
            Attention(
                owner="language model",
                groups=getattr(module, "num_key_value_groups", 1),
                head_dim=module.head_dim,
                scale=module.scaling,
                causal=module.is_causal,
                window=getattr(module, "sliding_window", None),
                dtype=embeddings.dtype,
                device=min(devices, key=str, default=embeddings.device),
                trained=True,
            )
        )
    return list(dict.fromkeys(found))
