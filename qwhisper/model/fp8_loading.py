"""Loads a language model with its linears in fp8: transformers' loader quantises each matrix as it comes from the file.

One matrix at a time is held in the dtype of the model, on the device where it stays.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qwhisper.errors import UsageError
from qwhisper.model.fp8 import Float8Linear, float8_layers, quantise_rows

METHOD = "qwhisper_float8"


@dataclass
class Float8Config(QuantizationConfigMixin):
    """What transformers' loader is given, so that it calls the quantizer below."""

    quant_method: str = METHOD


@register_quantizer(METHOD)
class Float8Quantizer(HfQuantizer):
    """Puts a `Float8Linear` in the place of every `nn.Linear` except the head, and fills it while loading."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        head = model.get_output_embeddings()
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not head:
                weight = module.weight
                size = module.in_features, module.out_features, module.bias is not None
                model.set_submodule(path, Float8Linear(*size, dtype=weight.dtype, device=weight.device))
        if not float8_layers(model):
            raise UsageError(
                f"--load_in_fp8: a {model.config.model_type} model has no nn.Linear that could be kept in fp8; leave "
                "the flag out"
            )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), Float8Linear)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes, for device maps and for the memory that the loader reserves."""
        return 1 if self.param_needs_quantization(model, param_name) else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise()

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether a plain Trainer may train LoRA on such a base."""
        return True


class _Quantise(ConversionOps):
    """One matrix to values and scales."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = {}
        for name, matrices in input_dict.items():
            matrix = matrices[0] if isinstance(matrices, list) else matrices
            values, scales = quantise_rows(matrix)
            for key, tensor in ((name, values), (f"{name}_scale", scales)):
                found[key] = nn.Parameter(tensor, requires_grad=False)
        return found
