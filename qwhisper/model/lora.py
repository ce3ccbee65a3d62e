"""LoRA (Hu et al., 2021) on the language model's linears: PEFT injects, names and saves; the forward pass is ours.

A and B are kept in fp32 and cast to the compute dtype where they are used. PEFT casts the activations up instead, which
keeps a second, fp32 copy of every layer's input for the backward pass.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwhisper.errors import UsageError
from qwhisper.model.fp8 import Float8Linear

LANGUAGE_MODEL = "model.language_model"
ADAPTER = "default"


def _forward(self, x: Tensor, *args, **kwargs) -> Tensor:
    """base(x) + scaling * B A x, computed in the base layer's output dtype.

    PEFT handles any case other than one plain, unmerged adapter in memory.
    """
    plain = (
        not kwargs and not self.disable_adapters and not self.merged and self.active_adapters == [ADAPTER]
        and ADAPTER in self.lora_A and ADAPTER not in self.lora_variant
        # Offloaded by accelerate, whose hooks load the weights only if the modules are called.
        and not self.lora_A[ADAPTER].weight.is_meta and not self.lora_B[ADAPTER].weight.is_meta
    )  # fmt: skip
    if not plain:
        return super(type(self), self).forward(x, *args, **kwargs)
    result = self.base_layer(x, *args)
    x = self.lora_dropout[ADAPTER](x).to(result.dtype)
    low_rank = nn.functional.linear(x, self.lora_A[ADAPTER].weight.to(x.dtype))
    up = self.lora_B[ADAPTER]  # with a bias under PEFT's lora_bias
    update = nn.functional.linear(low_rank, up.weight.to(x.dtype), None if up.bias is None else up.bias.to(x.dtype))
    return result + update * self.scaling[ADAPTER]


def _merge(self, *args, **kwargs) -> None:
    """Add B A to the weight, as in PEFT, which does nothing to an offloaded weight and marks it as merged all the same.

    Raises UsageError if a weight of the layer is offloaded, or has no values.
    """
    _refuse_offloaded(self, "merge")
    super(type(self), self).merge(*args, **kwargs)


def _unmerge(self) -> None:
    """Subtract B A from the weight. Errors as for merging."""
    _refuse_offloaded(self, "unmerge")
    super(type(self), self).unmerge()


def _refuse_offloaded(layer: nn.Module, what: str) -> None:
    if _has_offloaded(layer):
        raise UsageError(
            f"{what}() can't change this layer, whose weights are offloaded: load the model without offloading, as "
            f"with device_map='cpu', and {what} it there"
        )


def _has_offloaded(layer: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in layer.parameters())


def is_doubtful_merge(layer: LoraLayer) -> bool:
    """Whether the layer says that it is merged, and PEFT's own `merge` may have found its weights offloaded."""
    return layer.merged and type(layer).merge is not _merge and _has_offloaded(layer)


class LoraLinear(PeftLinear):
    """LoRA on `nn.Linear`."""

    forward, merge, unmerge = _forward, _merge, _unmerge


class LoraConv1D(PeftLinear):
    """LoRA on GPT-2's linear, with PEFT's forward pass."""

    merge, unmerge = _merge, _unmerge

    def __init__(self, base_layer: Conv1D, adapter_name: str, config: LoraConfig, **kwargs) -> None:
        config.fan_in_fan_out = True  # its weight is [in, out]; the saved configuration says so too
        super().__init__(base_layer, adapter_name, config=config, is_target_conv_1d_layer=True, **kwargs)


class LoraFloat8Linear(PeftLinear):
    """LoRA on a linear in fp8."""

    forward = _forward

    def merge(self, *args, **kwargs) -> None:
        """Raises UsageError: the sum, rounded to fp8, would lose most of what was learned."""
        raise UsageError("merge() can't change a layer in fp8: load the model with load_in_fp8=False and merge there")


class OneAdapter(dict[str, LoraConfig]):
    """A model's `peft_config` that takes no second adapter: PEFT would replace the one that is there, or switch it off.

    PEFT adds an adapter's configuration here before it changes anything in the model. `delete_adapter` empties it.
    """

    def __setitem__(self, name: str, config: LoraConfig) -> None:
        refuse_second_adapter(self)
        super().__setitem__(name, config)

    def update(self, *args, **kwargs) -> None:
        refuse_second_adapter(self)
        super().update(*args, **kwargs)

    def __reduce__(self):
        return OneAdapter, (dict(self),)  # copies and pickles would add each item


def refuse_second_adapter(configs: Mapping[str, PeftConfig] | None) -> None:
    """Raise UsageError if a model with this `peft_config` has an adapter."""
    if configs:
        raise UsageError(
            f"this model has an adapter named {', '.join(map(repr, configs))}, and a new one would replace it or "
            "switch it off: train that one, or merge it first (call merge() of each LoraLayer, save_pretrained, "
            "from_pretrained)"
        )


def _layer_types(model: PreTrainedModel) -> dict[type[nn.Module], type[nn.Module]]:
    """Base layer type to LoRA layer type; quantised ones first, since they are subclasses of `nn.Linear`."""
    types: dict[type[nn.Module], type[nn.Module]] = {}
    if getattr(model, "is_loaded_in_4bit", False):
        import bitsandbytes as bnb
        from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

        methods = {"forward": _forward, "merge": _merge, "unmerge": _unmerge}
        types[bnb.nn.Linear4bit] = type("LoraLinear4bit", (PeftLinear4bit,), methods)
    return types | {Float8Linear: LoraFloat8Linear, nn.Linear: LoraLinear, Conv1D: LoraConv1D}


def lm_linear_names(model: PreTrainedModel) -> list[str]:
    """Last name parts of the language model's linears (q_proj, …), sorted; its head is not among them."""
    language_model = model.get_submodule(LANGUAGE_MODEL)
    linears = (nn.Linear, Conv1D)  # Conv1D is GPT-2's name for a linear
    names = {name.rsplit(".", 1)[-1] for name, m in language_model.named_modules() if isinstance(m, linears)}
    return sorted(names - {"base_layer"})


def target_regex(suffixes: list[str]) -> str:
    """Anchored at the language model: the encoder and the projector have linears of the same names."""
    return rf"{re.escape(LANGUAGE_MODEL)}\..+\.({'|'.join(map(re.escape, sorted(suffixes)))})"


def add_lora(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: list[str] | None = None,
    init_scale: float = 0.1,
    fp32: bool = True,
) -> None:
    """Inject a fresh adapter: A Kaiming uniform × `init_scale`, B zero, so that the model's output does not change
    yet.

    target_modules: names of linears of the LM (None: all of them). Everything else keeps its `requires_grad`.
    Raises UsageError for other names, and if the model has an adapter.
    """
    refuse_second_adapter(getattr(model, "peft_config", None))
    known = lm_linear_names(model)
    wanted = known if target_modules is None else list(target_modules)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(f"--lora_target_modules {' '.join(unknown)}: the language model has {', '.join(known)}")
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_regex(wanted),
        bias="none",
        task_type="CAUSAL_LM",
    )
    inject(model, config)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    outside = [name for name in adapted if not name.startswith(LANGUAGE_MODEL + ".")]
    assert not outside, f"LoRA outside the language model: {outside[:3]}"
    with torch.no_grad():
        for name, parameter in lora_parameters(model):
            parameter.data = parameter.data.to(torch.float32 if fp32 else model.get_submodule(LANGUAGE_MODEL).dtype)
            if "lora_A" in name:
                parameter.mul_(init_scale)


def inject(model: PreTrainedModel, config: LoraConfig) -> None:
    """Inject the adapter that `config` describes, with our forward pass."""
    config._register_custom_module(_layer_types(model))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    inject_adapter_in_model(config, model, ADAPTER)
    _place_beside_offloaded(model)
    configs = OneAdapter({ADAPTER: config})
    for module in model.modules():  # PEFT takes the model's parts too
        if isinstance(module, PreTrainedModel) and any(isinstance(part, LoraLayer) for part in module.modules()):
            module.peft_config = configs
    model._hf_peft_config_loaded = (
        True  # transformers' mark of an adapter: a plain Trainer trains no 4-bit model without it
    )
    for name, parameter in model.named_parameters():
        # PEFT freezes all that is not its own; the projector and an unfrozen encoder stay as they were.
        parameter.requires_grad_("lora_" in name or name in trainable)


def _place_beside_offloaded(model: PreTrainedModel) -> None:
    """Put A and B of a layer whose weight is offloaded on the device that computes; PEFT made them without values."""
    for name, module in model.named_modules():
        hook = getattr(getattr(module, "base_layer", None), "_hf_hook", None)
        if not isinstance(module, LoraLayer) or hook is None or not module.base_layer.weight.is_meta:
            continue
        for matrices in (module.lora_A, module.lora_B):
            matrices.to_empty(device=hook.execution_device)
        module.reset_lora_parameters(ADAPTER, True)
        if empty := [key for key, parameter in module.named_parameters() if "lora_" in key and parameter.is_meta]:
            raise UsageError(f"{name} is offloaded, and its {empty[0]} can't be: load the model without offloading")


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Switch LoRA off, without a copy of the language model. PEFT's own switch would also freeze A and B."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and not module.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def lora_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of every A and B, in module order."""
    return [(name, p) for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
