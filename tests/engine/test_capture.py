"""A pack with its loss and backward pass is one CUDA graph: replayed on another pack, it computes what the plain pass
does, with the count, loss scale and random numbers of the replay.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwhisper.data.rows import Sample
from qwhisper.engine.batch import Batch
from qwhisper.engine.executor import Executor
from qwhisper.guards.gradient_buffers import GradientBuffers
from qwhisper.model.attention import PACKED_KERNELS
from qwhisper.model.lora import add_lora
from qwhisper.train.optimizer import parameter_groups
from tests.model.parts import make_sample, with_teacher
from tests.small import large_weights, small_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
OF_THE_HOST = "cu_seq_lens_host"  # no kernel of a graph reads it


def copy_into(mine: Any, other: Any) -> None:
    """Copies the tensors of a dataclass into those of another; all else must be equal already."""
    for field in fields(mine):
        here, there = getattr(mine, field.name), getattr(other, field.name)
        if isinstance(here, Tensor):
            here.copy_(there)
        elif is_dataclass(here):
            copy_into(here, there)
        elif field.name != OF_THE_HOST:
            assert here == there, field.name


@dataclass
class TwoPacks:
    """A small model in training, and two packs of one shape.

    The second has other words, sounds and teachers; in another order also other borders.
    """

    executor: Executor
    buffers: GradientBuffers
    first: list[Sample]
    second: list[Sample]

    def run(self, pack: list[Sample]) -> Tensor:
        """Forward and backward pass, loss included. Returns the token losses; the gradients are in the buffers."""
        losses = []
        run_pack = type(self.executor).run_pack

        def remembered(batch: Batch):
            result = run_pack(self.executor, batch)
            losses.append(result.tokens.losses.detach())
            return result

        self.executor.run_pack = remembered
        self.executor._run_samples(pack, 0)
        return losses[0]

    def plain(self, pack: list[Sample]) -> list[Tensor]:
        """Token losses and gradients."""
        self.buffers.start()
        return [self.run(pack).clone(), *(flat.clone() for flat in self.buffers.flat)]

    def scale(self, count: float, loss_scale: float) -> None:
        """As at the beginning of a step."""
        self.executor._count.fill_(count)
        self.executor._scale.fill_(loss_scale)


def two_packs(device: str, *, teacher: bool = False, reverse: bool = False, dropout: float = 0.0) -> TwoPacks:
    torch.manual_seed(0)
    model = small_model()
    for part in (model.model.audio_tower, model.model.language_model, model.lm_head):
        part.to(torch.bfloat16)
    add_lora(model, dropout=dropout)
    large_weights(model.model.language_model)
    model.to(device).train()
    packs = []
    for seed in (0, 10):
        samples = [
            make_sample(model, [4] * (1 + len(clips)) + [3], clips, seed=seed + number)
            for number, clips in enumerate([[800, 5000], [7000], []])
        ]
        packs.append([with_teacher(samples[0], seed + 5), *samples[1:]] if teacher else samples)
    executor = Executor(model, max_tokens_per_pack=4096, pad_token_id=0, distill_weight=0.6 if teacher else 0.0)
    buffers = GradientBuffers(parameter_groups(model))
    executor.gradient_buffers = buffers
    return TwoPacks(executor, buffers, packs[0], packs[1][::-1] if reverse else packs[1])


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for number, (mine, other) in enumerate(zip(found, expected, strict=True)):
        difference = (mine - other).abs().max()
        assert torch.equal(mine, other), f"tensor {number}: {difference} of {other.abs().max()}"


BORDERS = pytest.mark.parametrize("reverse", [False, True], ids=["the same borders", "other borders"])
TEACHER = pytest.mark.parametrize("teacher", [False, True], ids=["alone", "teacher"])


@TEACHER
@BORDERS
@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_whose_tensors_are_overwritten_runs_as_the_other_pack(device, teacher, reverse, monkeypatch):
    by_segment = PACKED_KERNELS["sdpa_per_segment"]  # of the CPU; without borders on the host it reads the tensor

    def reading_the_tensor(*args, cu_seq_lens_host, **keywords):
        return by_segment(*args, **keywords)

    monkeypatch.setitem(PACKED_KERNELS, "sdpa_per_segment", reading_the_tensor)
    pair = two_packs(device, teacher=teacher, reverse=reverse)
    expected = [pair.plain(pack) for pack in (pair.first, pair.second)]
    batch, other = pair.executor.batch(pair.first), pair.executor.batch(pair.second)
    assert batch.shape == other.shape and not torch.equal(expected[0][0], expected[1][0])
    monkeypatch.setattr(pair.executor, "batch", lambda samples: batch)
    assert_same_bits(pair.plain([]), expected[0])
    copy_into(batch, other)
    assert_same_bits(pair.plain([]), expected[1])
    assert all(flat.any() for flat in expected[1][1:]) and len(expected[1]) == 3


def test_packs_of_two_shapes_are_not_copied():
    pair = two_packs("cpu")
    batch, shorter = pair.executor.batch(pair.first), pair.executor.batch(pair.second[:2])
    with pytest.raises((AssertionError, RuntimeError)):
        copy_into(batch, shorter)
    with pytest.raises(AssertionError, match="max_length"):
        copy_into(batch, replace(batch, text=replace(batch.text, max_length=1)))


def captured(pair: TwoPacks, batch: Batch) -> Callable[[], list[Tensor]]:
    """The run of a batch as one graph. Returns a function that replays it."""
    pair.executor.batch = lambda samples: batch
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # makes filters, kernels and handles of libraries
            pair.plain([])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    pair.buffers.start()
    with torch.cuda.graph(graph):
        losses = pair.run([])

    def replay() -> list[Tensor]:
        pair.buffers.start()
        graph.replay()
        return [losses.clone(), *(flat.clone() for flat in pair.buffers.flat)]

    return replay


@needs_gpu
@TEACHER
@BORDERS
def test_a_replay_on_another_pack_gives_its_losses_and_gradients_to_the_last_bit(teacher, reverse):
    pair = two_packs("cuda", teacher=teacher, reverse=reverse)
    assert pair.executor.why_plain() is None
    steps = [(pair.first, 9.0, 1.0), (pair.second, 9.0, 1.0), (pair.second, 4.0, 64.0), (pair.first, 9.0, 1.0)]
    expected = []
    for pack, count, scale in steps:
        pair.scale(count, scale)
        expected.append(pair.plain(pack))
    batch, others = pair.executor.batch(pair.first), [pair.executor.batch(pack) for pack, *_ in steps]
    assert (batch.text.cu_seq_lens_host != others[1].text.cu_seq_lens_host) == reverse
    replay = captured(pair, batch)
    for (_, count, scale), other, plain in zip(steps, others, expected, strict=True):
        pair.scale(count, scale)
        copy_into(batch, other)
        assert_same_bits(replay(), plain)


@needs_gpu
def test_replays_draw_their_dropout_from_the_generator_as_plain_passes_do():
    """torch keeps the seed and the offset of a graph's generator in tensors, and sets them at each replay."""
    pair = two_packs("cuda", dropout=0.1)
    assert pair.executor.why_plain() is None
    batch = pair.executor.batch(pair.first)
    replay = captured(pair, batch)
    state = torch.cuda.get_rng_state()
    first, second = replay(), replay()
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a.any())
    torch.cuda.set_rng_state(state)
    assert_same_bits(replay(), first)
    torch.cuda.set_rng_state(state)
    assert_same_bits(pair.plain([]), first)
    assert_same_bits(pair.plain([]), second)  # a replay advances the generator as far as a plain pass
