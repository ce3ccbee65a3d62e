"""Keeps a Whisper encoder in fp16 within fp16's range, and counts what would have left it.

`WhisperEncoderLayer` bounds only what a layer returns. Values between its parts can overflow before that, and the sum
of an infinite value and its opposite is NaN, which no bound repairs.
"""

from functools import partial

import torch
from torch import Tensor, nn

BOUND = torch.finfo(torch.float16).max / 2  # the sum of two such values, a residual and what is added, is still finite
PARTS = ("conv1", "conv2", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class OverflowClamp:
    """Hooks on an encoder's layers and on those of their parts that add many products; idle unless these are fp16.

    Counts in one int64 tensor per module, on its device and always the same tensor, without waiting for it. NaN is
    neither changed nor counted.
    """

    def __init__(self, encoder: nn.Module):
        self._counts: dict[str, Tensor] = {}
        for name, module in encoder.named_modules():
            parent, _, last = name.rpartition(".")
            if last in PARTS or parent == "layers":
                module.register_forward_hook(partial(self.clamp_output, name))

    def take_counts(self) -> dict[str, int]:
        """{module's name: values bounded since the last call}, without zeros; waits for the device."""
        if not self._counts:
            return {}
        counts = torch.stack(list(self._counts.values())).tolist()
        found = {name: count for name, count in zip(self._counts, counts, strict=True) if count}
        torch._foreach_zero_(list(self._counts.values()))
        return found

    def clamp_output(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if output.dtype != torch.float16:
            return None
        count = (output.detach().abs() > BOUND).sum()
        known = self._counts.get(name)
        if known is not None and known.device == count.device:
            known += count
        else:
            self._counts[name] = count
        return output.clamp(-BOUND, BOUND)
