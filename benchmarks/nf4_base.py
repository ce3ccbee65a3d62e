"""A Qwen3 of real shapes with random weights, saved in NF4, one matrix at a time: the bf16 model is never held.

In bf16 a 32B is 65 GB, in NF4 with its embeddings and head in bf16 it is 19 GB. Quantises on the GPU if there is one
(`real_shapes.py --nf4_base`).
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from qwhisper.model.bases import four_bit_config

SHARD_BYTES = 4 << 30


def tensors_of(config: Qwen3Config, device: str) -> Iterator[dict[str, Tensor]]:
    """The entries of each weight in the file: bf16, or packed with its scales; matrices as drawn for a new model."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    quantised = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():  # a tied head is left out
        weight = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
        if parameter.ndim > 1:
            weight.normal_(0, config.initializer_range, generator=generator)
        if name not in quantised:
            yield {name: weight.cpu()}
            continue
        packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        scales = {f"{name}.{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}
        yield {name: packed.cpu(), **scales}


def write_nf4_base(config: Qwen3Config, folder: Path) -> None:
    """Write config.json and the weights in shards of at most `SHARD_BYTES` and one weight more."""
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for entries in tensors_of(config, "cuda" if torch.cuda.is_available() else "cpu"):
        shard.update(entries)
        total += sum(tensor.nbytes for tensor in entries.values())
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            write()
    if shard:
        write()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1))
    config.quantization_config = four_bit_config(torch.bfloat16).to_dict()
    config.architectures, config.dtype = ["Qwen3ForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)  # last: a folder with it is whole
