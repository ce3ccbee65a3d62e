"""A pack with ready indices runs without a wait for the device, at any larger shape with the same result."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from qwhisper.data.rows import Sample
from qwhisper.engine import forward
from qwhisper.engine.batch import PackShape, pack_shape, packed_batch, padded_batch
from qwhisper.engine.executor import Executor
from qwhisper.engine.forward import by_sample, run_pack
from qwhisper.frames import HOP_LENGTH
from qwhisper.model import loss as losses
from qwhisper.model.audio_layout import MARGIN_HOPS
from qwhisper.model.lora import add_lora
from qwhisper.model.segment_blocks import num_blocks, segment_blocks
from tests.model.parts import gradients, make_sample, with_teacher
from tests.small import VOCABULARY, large_weights, small_model

WEIGHT = 0.6
ROOM = PackShape(
    tokens=37, segments=4, max_length=5, supervised=9, audio_tokens=7, encoder_frames=61, mel_frames=90, windows=3,
    max_window=2,
)  # fmt: skip
AUDIO = ("audio_tokens", "encoder_frames", "mel_frames", "windows", "max_window")
TEXT_ROOM = replace(ROOM, **dict.fromkeys(AUDIO, 0))


def trained_model():
    """LoRA, projector, encoder and head are trained; dropout is 0."""
    torch.manual_seed(0)
    model = small_model()
    add_lora(model)
    large_weights(model.model.language_model)
    for part in (model.model.audio_tower, model.lm_head):
        part.requires_grad_(True)
    return model.train()


def samples_of(model, kind: str) -> list[Sample]:
    clips = [] if kind == "text" else [[800, 5000], [7000], []]
    samples = [make_sample(model, [4] * (1 + len(c)) + [3], c, seed=i) for i, c in enumerate(clips or [[], []])]
    if kind == "teacher":
        samples = [with_teacher(samples[0], 5), samples[1], with_teacher(samples[2], 6)]
    return samples


def with_room(shape: PackShape) -> PackShape:
    room = ROOM if shape.windows else TEXT_ROOM
    added = {name: value + getattr(shape, name) for name, value in vars(room).items() if name != "teacher"}
    teacher = replace(with_room(shape.teacher), supervised=added["supervised"]) if shape.teacher else None
    return PackShape(**added, teacher=teacher)


def run(model, samples, batch):
    """(token losses of each sample, divergences, gradients)."""
    model.zero_grad(set_to_none=True)
    tokens = run_pack(model, batch, WEIGHT).tokens
    (tokens.losses.sum() / 3).backward()
    divergence = torch.zeros(()) if tokens.divergences is None else tokens.divergences.sum()
    return by_sample(batch, tokens.losses.detach())[: len(samples)], divergence, gradients(model)


KINDS = pytest.mark.parametrize("kind", ["audio", "teacher", "text"])


@pytest.mark.parametrize(
    ("kind", "at_once"),
    [
        ("teacher", 2**26),
        *(pytest.param(kind, 2**26, marks=pytest.mark.slow) for kind in ("audio", "text")),
        *((kind, 5 * VOCABULARY) for kind in ("audio", "teacher", "text")),
    ],
)
def test_a_step_needs_no_value_of_a_tensor_and_no_shape_that_follows_from_one(kind, at_once, monkeypatch):
    """On "meta" a tensor has no values: what asks for one, or for a shape that follows from them, fails."""
    monkeypatch.setattr(losses, "MAX_LOGITS_AT_ONCE", at_once)
    model = trained_model()
    samples = samples_of(model, kind)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # there is none for this device
    model.to("meta")
    executor = Executor(model, max_tokens_per_pack=4096, pad_token_id=0, distill_weight=WEIGHT)
    step = executor.forward_backward(samples, 6)
    assert step.loss.device.type == "meta" and (step.divergence is not None) == (kind == "teacher")
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_B" in name for name in found) and any("linear_1" in name for name in found) == (kind != "text")


@KINDS
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_no_gpu(kind, dtype):
    model = trained_model()
    samples = samples_of(model, kind)
    model.model.language_model.to(dtype)
    model.lm_head.to(dtype)
    model.cuda()
    executor = Executor(model, max_tokens_per_pack=4096, pad_token_id=0, distill_weight=WEIGHT)
    expected = float(executor.forward_backward(samples, 6).loss)  # the first pass makes filters and kernels
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = executor.forward_backward(samples, 6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(step.loss) == pytest.approx(expected, rel=1e-4)


def poison(model, batch, exact: PackShape, monkeypatch) -> None:
    """NaN wherever a larger shape has rows that the samples do not fill; placeholders are looked up as padding is."""
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = torch.nan

    def bad_rows(real: int):
        def hook(module, args, output):
            states = output if isinstance(output, torch.Tensor) else output.last_hidden_state
            rows = torch.arange(states.shape[-2]) < real
            states = torch.where(rows[:, None], states, torch.nan)
            if isinstance(output, torch.Tensor):
                return states
            output.last_hidden_state = states
            return output

        return hook

    if batch.audio is not None:
        batch.audio.row[HOP_LENGTH * (exact.mel_frames + MARGIN_HOPS * exact.windows) :] = torch.nan
        model.model.audio_tower.register_forward_hook(bad_rows(exact.encoder_frames))
        model.model.multi_modal_projector.register_forward_hook(bad_rows(exact.audio_tokens))
    real = {batch.shape.tokens: exact.tokens}
    if exact.teacher is not None:
        real[batch.shape.teacher.tokens] = exact.teacher.tokens

    def bad_tokens(module, args, output):
        return bad_rows(real[output.last_hidden_state.shape[1]])(module, args, output)

    model.model.language_model.register_forward_hook(bad_tokens)
    bad_row = torch.full((1, model.lm_head.in_features), torch.nan)
    monkeypatch.setattr(forward, "with_zero_row", lambda rows: torch.cat([rows, bad_row]))


@KINDS
@pytest.mark.parametrize("poisoned", [False, True])
def test_a_larger_shape_gives_the_same_losses_and_gradients_whatever_stands_in_it(kind, poisoned, monkeypatch):
    model = trained_model()
    samples, frames = samples_of(model, kind), model.config.frames
    exact = pack_shape(samples, frames, teach=True)
    batch = packed_batch(samples, frames, model.config.audio_token_id, teach=True)
    assert batch.shape == exact and (exact.teacher is not None) == (kind == "teacher")
    expected = run(model, samples, batch)
    padded = packed_batch(samples, frames, model.config.audio_token_id, teach=True, shape=with_room(exact))
    assert padded.text.input_ids.shape[1] == exact.tokens + ROOM.tokens
    assert len(padded.text.targets) == exact.supervised + ROOM.supervised
    if poisoned:
        poison(model, padded, exact, monkeypatch)
    found = run(model, samples, padded)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)
    assert found[2].keys() == expected[2].keys() and len(expected[2]) > 20
    for name, gradient in expected[2].items():
        assert gradient.any() or kind == "text", name
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[2][name], gradient, atol=1e-5 * max(1.0, scale), rtol=1e-4, msg=name)


def test_audio_alone_may_have_a_larger_shape_than_the_samples_need(monkeypatch):
    """No token of the row is padding that the rounded-up audio tokens could be put at."""
    model = trained_model()
    samples, frames = samples_of(model, "audio"), model.config.frames
    exact = pack_shape(samples, frames)
    audio = {name: value for name, value in vars(with_room(exact)).items() if name in AUDIO}
    expected = run(model, samples, packed_batch(samples, frames, model.config.audio_token_id))
    batch = packed_batch(samples, frames, model.config.audio_token_id, shape=replace(exact, **audio))
    assert len(batch.audio.positions) == exact.audio_tokens + ROOM.audio_tokens
    poison(model, batch, exact, monkeypatch)
    losses_of_samples, _, _ = run(model, samples, batch)
    torch.testing.assert_close(losses_of_samples, expected[0], atol=1e-5, rtol=1e-5)


@KINDS
def test_losses_of_samples_are_those_of_each_alone_packed_or_padded(kind):
    model = trained_model()
    samples, frames, audio = samples_of(model, kind), model.config.frames, model.config.audio_token_id
    alone = [run(model, [s], packed_batch([s], frames, audio, teach=True))[0] for s in samples]
    for batch in (
        packed_batch(samples, frames, audio, teach=True),
        padded_batch(samples, frames, audio, 0, teach=True),
        padded_batch(samples, frames, audio, 0, teach=True, multiple_of=64),
    ):
        torch.testing.assert_close(run(model, samples, batch)[0], torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_the_teachers_positions_stand_in_the_order_of_the_supervised_ones():
    model = trained_model()
    samples = samples_of(model, "teacher")
    batch = packed_batch(samples, model.config.frames, model.config.audio_token_id, teach=True)
    count = samples[0].num_supervised
    assert batch.text.targets.tolist() == [t for sample in samples for t in sample.targets]
    assert batch.taught.tolist() == [True] * count + [False] * count + [True] * count
    first = len(samples[0].teacher.input_ids)
    nowhere = batch.teacher.shape.tokens
    assert batch.teacher_position.tolist() == [
        *range(5, 5 + count), *[nowhere] * count, *range(first + 5, first + 5 + count)
    ]  # fmt: skip
    assert batch.text.segments.tolist() == [n for n in range(3) for _ in range(count)]


def test_padding_tokens_stand_in_segments_of_at_most_the_longest_and_unused_borders_repeat_the_end():
    model = trained_model()
    samples = samples_of(model, "text")
    exact = pack_shape(samples, model.config.frames)
    shape = replace(exact, tokens=exact.tokens + 20, segments=exact.segments + 5, supervised=exact.supervised + 2)
    text = packed_batch(samples, model.config.frames, model.config.audio_token_id, shape=shape).text
    lengths = text.cu_seq_lens.diff().tolist()
    assert sum(lengths) == shape.tokens and max(lengths) == exact.max_length == text.max_length
    assert lengths[2:] == [7, 7, 6, 0, 0] and text.cu_seq_lens_host == tuple(text.cu_seq_lens.tolist())
    table = segment_blocks(text.cu_seq_lens_host)
    assert torch.equal(text.keywords()["segment_blocks"], table) and len(table) == num_blocks(shape.tokens, 7)
    assert text.targets.tolist()[-2:] == [-100, -100] and text.positions.tolist()[-2:] == [shape.tokens] * 2
    assert text.segments.tolist()[-2:] == [shape.segments] * 2


@pytest.mark.parametrize("field", ["tokens", "segments", "supervised", "mel_frames", "encoder_frames", "audio_tokens"])
def test_a_shape_that_is_too_small_is_refused(field):
    model = trained_model()
    samples, frames = samples_of(model, "audio"), model.config.frames
    shape = pack_shape(samples, frames)
    small = replace(shape, **{field: getattr(shape, field) - 1})
    with pytest.raises(ValueError, match="fit into"):
        packed_batch(samples, frames, model.config.audio_token_id, shape=small)


def test_what_does_not_belong_together_is_refused():
    model = trained_model()
    (first, *_, last), frames, audio = samples_of(model, "teacher"), model.config.frames, model.config.audio_token_id
    with pytest.raises(ValueError, match=r"audio placeholders in s0, but the audio gives \d+ tokens"):
        packed_batch([replace(first, windows=first.windows[:1])], frames, audio)
    more = replace(last.teacher, labels=last.teacher.input_ids.copy())
    more.labels[:3] = -100
    with pytest.raises(ValueError, match="its teacher has 6 supervised tokens, not 3"):
        packed_batch([replace(last, teacher=more)], frames, audio, teach=True)
    shape = pack_shape([last], frames, teach=True)
    with pytest.raises(ValueError, match="the teacher has 4 supervised positions, the pack 3"):
        replace(shape, teacher=replace(shape.teacher, supervised=4))


def test_an_encoder_on_another_device_has_its_own_part_there():
    model = trained_model()
    batch = packed_batch(samples_of(model, "audio"), model.config.frames, model.config.audio_token_id)
    moved = batch.to(torch.device("meta"), torch.device("cpu"))
    there = (moved.audio.row, moved.audio.layout.mel.frames, moved.audio.layout.encoder.slots)
    here = (moved.audio.positions, moved.audio.layout.groups, moved.text.input_ids, moved.text.targets)
    assert {x.device.type for x in there} == {"cpu"} and {x.device.type for x in here} == {"meta"}
