"""One pack through the model: hidden states, the teacher's hidden states, the loss of each supervised token."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qwhisper.engine.batch import Batch, TextPart
from qwhisper.model.audio_layout import with_zero_row
from qwhisper.model.lora import adapter_off
from qwhisper.model.loss import (
    IGNORE_INDEX,
    MAX_LOGITS_AT_ONCE,
    Lesson,
    OfChunk,
    TokenLosses,
    head_logits,
    of_chunk,
    token_losses,
)
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration


def hidden_states_of(model: Qwen3AudioForConditionalGeneration, batch: Batch) -> Tensor:
    """The language model's last hidden states, [rows, columns, hidden]. Waits for no device."""
    return _hidden_states(model, batch.text, heard(model, batch))


@dataclass(frozen=True)
class Heard:
    """frames: [encoder frames, d_model], the encoder's output. groups, positions: see `AudioLayout` and `AudioPart`."""

    frames: Tensor
    groups: Tensor
    positions: Tensor


def heard(model: Qwen3AudioForConditionalGeneration, batch: Batch) -> Heard | None:
    """What the encoder gives for the pack's audio, or what the feature cache has; None for text alone. Waits for no
    device.
    """
    audio = batch.audio
    if audio is None:
        return None
    frames = audio.known_frames
    if frames is None:
        frames = model.model.encoded_row(*audio.unencoded)
    return Heard(frames, audio.layout.groups, audio.positions)


def _hidden_states(model: Qwen3AudioForConditionalGeneration, text: TextPart, audio: Heard | None) -> Tensor:
    body = model.model
    if audio is None:
        embeddings = body.get_input_embeddings()(text.input_ids)
    else:
        tokens = body.projected(audio.frames, audio.groups)
        embeddings = body.embed_with_audio(text.input_ids, tokens, audio.positions)
    embeddings = torch.where(text.real[..., None], embeddings, 0.0)
    return body(inputs_embeds=embeddings, use_cache=False, **text.keywords()).last_hidden_state


def at(hidden_states: Tensor, positions: Tensor) -> Tensor:
    """[positions, hidden] selected from [rows, columns, hidden]; zeros for a position past the last."""
    return with_zero_row(hidden_states.flatten(0, 1)).index_select(0, positions.to(hidden_states.device))


@torch.no_grad()
def teacher_states(model: Qwen3AudioForConditionalGeneration, batch: Batch) -> Tensor:
    """The hidden states, [rows, columns, hidden], without the language model's adapter and in evaluation mode."""
    language_model, was_training = model.model.language_model, model.training
    try:
        language_model.eval()
        with adapter_off(language_model):
            return hidden_states_of(model, batch)
    finally:
        language_model.train(was_training)


@dataclass(frozen=True)
class PackResult:
    """The result of one pack. hidden_states: [rows, columns, hidden], the language model's last. lesson: None without a
    teacher. tokens: loss and divergence of each supervised position.
    """

    hidden_states: Tensor
    lesson: Lesson | None
    tokens: TokenLosses


def run_pack(model: Qwen3AudioForConditionalGeneration, batch: Batch, distill_weight: float) -> PackResult:
    """Forward pass of a pack. distill_weight: weight of the divergence from its teacher, if it has one."""
    return answer(model, batch.text, heard(model, batch), batch.teacher, distill_weight)


def answer(
    model: Qwen3AudioForConditionalGeneration,
    text: TextPart,
    audio: Heard | None,
    teacher: Batch | None,
    distill_weight: float,
    chunk: OfChunk = of_chunk,
) -> PackResult:
    """What follows the encoder: projector, language model, teacher and losses. chunk: see `token_losses`."""
    hidden_states, lesson = _hidden_states(model, text, audio), None
    if teacher is not None:
        states = teacher_states(model, teacher)
        taught = (teacher.text.targets != IGNORE_INDEX).to(states.device)
        lesson = Lesson(at(states, teacher.text.positions), taught, distill_weight)
    tokens = token_losses(
        at(hidden_states, text.positions),
        text.targets.to(hidden_states.device),
        model.lm_head,
        softcap=model.softcap,
        lesson=lesson,
        chunk=chunk,
    )
    return PackResult(hidden_states, lesson, tokens)


def likeliest_tokens(model: Qwen3AudioForConditionalGeneration, batch: Batch, hidden_states: Tensor) -> Tensor:
    """int64 [supervised], the token that greedy decoding would give at each supervised position."""
    rows = max(1, MAX_LOGITS_AT_ONCE // model.lm_head.weight.shape[0])
    return torch.cat([_likeliest(model, part) for part in at(hidden_states, batch.text.positions).split(rows)])


def _likeliest(model: Qwen3AudioForConditionalGeneration, hidden_states: Tensor) -> Tensor:
    logits = head_logits(hidden_states, model.lm_head, model.softcap)
    audio = model.config.audio_token_id
    logits[:, audio : audio + 1] = -math.inf  # never generated, and may be outside of the vocabulary
    return logits.argmax(-1)


def by_sample(batch: Batch, values: Tensor) -> Tensor:
    """[segments], the sum of values [supervised] for each sample of a pack."""
    sums = values.new_zeros(batch.shape.segments + 1)
    return sums.index_add(0, batch.text.segments.to(values.device), values)[:-1]
