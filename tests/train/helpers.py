"""Reading back what a run wrote, and building a `Run` whose steps a test takes one by one."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from qwhisper.data.conversation import read_conversations
from qwhisper.train.dataset import EncodedDialogues, encode_all
from qwhisper.train.run import assemble_run, build, collator_for
from qwhisper.train.state import TrainState

WEIGHT_FILES = ("projector.safetensors", "adapter_model.safetensors", "optimizer.safetensors", "generators.safetensors")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every saved tensor of a checkpoint under "file|name"."""
    return {
        f"{file}|{name}": tensor
        for file in WEIGHT_FILES
        if (folder / file).exists()
        for name, tensor in load_file(folder / file).items()
    }


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that differ; empty when both hold the same."""
    return [
        name
        for name in sorted(a.keys() | b.keys())
        if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]


def make_run(args, callbacks=()):
    """A `Run` that nobody has started, and all of its samples."""
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model, processor = build(args, None)
    conversations = read_conversations(args.train_file)
    run = assemble_run(args, model, processor, conversations, [], TrainState(), list(callbacks))
    model.train()
    samples, _ = encode_all(EncodedDialogues(conversations, collator_for(args, processor)))
    return run, samples


def gradients(run) -> dict[str, torch.Tensor]:
    return {
        name: p.grad.clone()
        for name, p in run.executor.model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def trainable(run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.executor.model.named_parameters() if p.requires_grad}
