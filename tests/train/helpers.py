"""Reading back what a run wrote, and building a `Session` whose steps a test takes one by one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwhisper.data import dialogue_audio
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.loader import StepSamples, encode_all
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.train.loop import train_step
from qwhisper.train.models import build_model
from qwhisper.train.plan import resolve
from qwhisper.train.session import build_session, encoder_for
from qwhisper.train.state import TrainState

# Sums of at most a few thousand fp32 products, in another order: 1e-5 of the largest gradient is about 100 roundings.
TOLERANCE = 1e-5
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
    """A `Session` that nobody has started, and all of its samples."""
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    dialogues = read_dialogues(args.train_file)
    plan = resolve(args, num_dialogues=len(dialogues))
    model, processor = build_model(args, plan, None)
    run = build_session(args, plan, model, processor, dialogues, [], TrainState(), list(callbacks))
    model.train()
    samples, _ = encode_all(dialogues, encoder_for(args, processor, model))
    return run, samples


def gradients(run) -> dict[str, torch.Tensor]:
    return {
        name: p.grad.clone()
        for name, p in run.executor.model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def trainable(run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.executor.model.named_parameters() if p.requires_grad}


def step(run, samples, rejections=()):
    return train_step(run, StepSamples(list(samples), list(rejections)))


def adam_state(run) -> dict:
    return {
        f"{i}|{key}": value.clone()
        for i, moments in enumerate(run.optimizer.state.values())
        for key, value in moments.items()
    }


def loss_and_gradients(run, samples, *, max_tokens, packing=True):
    run.executor.model.zero_grad(set_to_none=True)
    run.executor.max_tokens_per_pack, run.executor.packing = max_tokens, packing
    step = run.executor.forward_backward(samples, sum(s.num_supervised for s in samples))
    return float(step.loss), gradients(run)


def assert_same(first, second):
    loss, grads = first
    other_loss, other_grads = second
    assert loss == pytest.approx(other_loss, rel=TOLERANCE)
    assert grads.keys() == other_grads.keys() and grads
    scale = max(float(g.abs().max()) for g in grads.values())
    for name in grads:
        assert float((grads[name] - other_grads[name]).abs().max()) <= TOLERANCE * scale, name


def count_calls(monkeypatch) -> dict[str, int]:
    """How often the encoder runs and a clip is decoded in this process, from now on."""
    counts = {"encoder": 0, "decoder": 0}

    def counting(name: str, honest):
        def counted(*args, **kwargs):
            counts[name] += 1
            return honest(*args, **kwargs)

        return counted

    monkeypatch.setattr(TrueLengthWhisperEncoder, "forward", counting("encoder", TrueLengthWhisperEncoder.forward))
    monkeypatch.setattr(dialogue_audio, "load_clip", counting("decoder", dialogue_audio.load_clip))
    return counts
