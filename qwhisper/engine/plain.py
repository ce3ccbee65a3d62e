"""Why a pack has to run plain, kernel by kernel from Python, and can't be replayed from a CUDA graph.

A graph repeats the kernels of one pass on the same memory; no Python runs. What varies between passes is therefore in
tensors that keep their place: the batch, the executor's count and loss scale, the clamp's bound, the gradients
(`guards.gradient_buffers`). Seed and offset of dropout are such tensors too, made by torch: the kernels of a graph read
them through pointers, and each replay first sets them from the default generator and advances it. So a replay draws
what the plain pass would (Note "CUDA Graph-safe RNG states" in ATen/cuda/CUDAGeneratorImpl.h).
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn.modules import module as hooks_of_all

from qwhisper.engine.kernels import attentions, implementation_of, part_of
from qwhisper.guards.clamp import ActivationClamp
from qwhisper.guards.gradient_buffers import attach_view
from qwhisper.model.attention import IMPLEMENTATIONS, encoder_attention, packed_kernel
from qwhisper.model.half_precision import OverflowClamp
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration

# A capture records their kernels, and their counts are tensors; a replay attaches the gradients itself.
CAPTURED_HOOKS = (ActivationClamp.clamp_input, OverflowClamp.clamp_output, attach_view)
MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def why_plain(model: Qwen3AudioForConditionalGeneration, *, manual_loss: bool, packing: bool) -> str | None:
    """Why a pack of this model has to run plain in training; None if a CUDA graph would compute the same.

    manual_loss, packing: those of the `Executor`. Hooks, kernels and devices may change later: the answer holds until
    then. A hook is a reason unless a capture records all that it does (the clamps, the gradient buffers); so are those
    of `guards.diagnose`. Reads no value of a tensor; walks all modules, 25 µs each [measured]. An operation that torch
    can't capture, such as a wait within the language model, is not found here: its capture fails.
    """
    if reason := _device_reason(model):
        return reason
    if manual_loss:
        return "--manual_loss compares the loss of each pack with a plain one"
    if model.keep_last_logits:
        return "a callback asks for the logits of each pack (keep_last_logits)"
    if not packing:
        return "the language model can't keep samples of one row apart, so batches are padded"
    return _kernel_reason(model) or _random_reason(model) or _hook_reason(model)


def fingerprint(model: Qwen3AudioForConditionalGeneration) -> int:
    """A number that changes with what callbacks may change on a model and a CUDA graph would not show: hooks, modes,
    what is trained, dropout, `keep_last_logits`. Takes about 1 ms for 900 modules.
    """
    found: list[object] = [model.keep_last_logits]
    for module in model.modules():
        found += [module.training, getattr(module, "p", None), *(len(getattr(module, kind)) for kind in MODULE_HOOKS)]
    found += [parameter.requires_grad for parameter in model.parameters()]
    return hash(tuple(found))


def _device_reason(model: Qwen3AudioForConditionalGeneration) -> str | None:
    body = model.model
    encoder = _devices([body.audio_tower])
    others = _devices([body.language_model, body.multi_modal_projector, model.lm_head])
    if any(not device.startswith("cuda") for device in others) or len(others) > 1:
        return f"the model is on {' and '.join(others)}, and a CUDA graph needs one CUDA device"
    if encoder != others:
        return f"the encoder is on {' and '.join(encoder)}, the language model on {others[0]} (--whisper_cpu)"
    return None


def _devices(modules: Iterable[nn.Module]) -> list[str]:
    return sorted({str(parameter.device) for module in modules for parameter in module.parameters()})


def _kernel_reason(model: Qwen3AudioForConditionalGeneration) -> str | None:
    if encoder_attention(model.config.audio_config) not in IMPLEMENTATIONS:
        return "the encoder's eager attention needs the lengths of the windows on the host"
    for attention in attentions(model):
        config = part_of(attention, model).config
        query = torch.empty(0, attention.head_dim, dtype=attention.dtype, device=attention.device)
        dropout = getattr(config, "attention_dropout", 0.0) if attention.trained else 0.0
        kernel = packed_kernel(implementation_of(attention, model), query, dropout, has_blocks=True)
        if kernel not in ("segments", "varlen"):  # these read the borders of the samples on the device
            return f"the {attention.owner}'s attention kernel, {kernel}, needs the lengths of the samples on the host"
    return None


def _random_reason(model: Qwen3AudioForConditionalGeneration) -> str | None:
    body = model.model
    if body.encoder_is_trained and body.audio_tower.layerdrop > 0:
        return "the host draws which of the encoder's layers are skipped (encoder_layerdrop)"
    for module in body.language_model.modules():
        if getattr(module, "gradient_checkpointing", False):
            recompute = module._gradient_checkpointing_func
            if getattr(recompute, "keywords", {}).get("preserve_rng_state", True):
                return (
                    "layers computed again (--recompute_layers, --gradient_checkpointing) with dropout read the random "
                    "generator, which a capture forbids"
                )
    return None


def _hook_reason(model: Qwen3AudioForConditionalGeneration) -> str | None:
    for kind in MODULE_HOOKS:
        for hook in getattr(hooks_of_all, f"_global{kind}").values():
            return f"a hook on all modules ({_name(hook)}) would not be called"
    # transformers' hooks for checkpointing only mark the embeddings for autograd, which no replay needs.
    marks = {handle.id for module in model.modules() for handle in getattr(module, "_require_grads_hooks", ())}
    for name, hooks in _hooks(model):
        for number, hook in hooks.items():
            if number not in marks and _function(hook) not in CAPTURED_HOOKS:
                return f"a hook on {name} ({_name(hook)}) would not be called"
    return None


def _hooks(model: Qwen3AudioForConditionalGeneration) -> Iterator[tuple[str, dict[int, Callable]]]:
    """Name and hooks of the model's parts, which a pack calls, and of its parameters."""
    for name, part in model.named_modules():
        if part is not model:
            yield from ((name, getattr(part, kind)) for kind in MODULE_HOOKS)
    for name, parameter in model.named_parameters():
        yield from ((name, getattr(parameter, kind, None) or {}) for kind in PARAMETER_HOOKS)


def _function(hook: Callable) -> Callable:
    """Without bound arguments."""
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__func__", hook)


def _name(hook: Callable) -> str:
    function = _function(hook)
    return getattr(function, "__qualname__", type(function).__name__)
