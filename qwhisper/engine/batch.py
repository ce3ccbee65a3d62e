"""A pack of samples as tensors, with all indices that the model needs, made on the host.

`PackShape` holds the sizes that determine all tensor shapes of a pack. A batch can have a larger shape than its samples
need, so that a run has few different shapes: the padding points at rows of zeros, on which no result depends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qwhisper.data.rows import Sample
from qwhisper.engine.encoded_audio import encoded_windows, frames_of, sizes_of
from qwhisper.frames import FrameArithmetic
from qwhisper.model.audio_layout import (
    AudioLayout,
    AudioSizes,
    EncoderLayout,
    MelLayout,
    audio_layout,
    kept_layout,
    on_device,
    padding_segments,
    waveform_row,
)
from qwhisper.model.loss import IGNORE_INDEX
from qwhisper.model.segment_blocks import segment_blocks


@dataclass(frozen=True, kw_only=True)
class PackShape:
    """tokens: of all segments; max_length: of the longest. supervised: positions with a loss. windows: 0 for a pack of
    text alone. max_window: encoder frames of the longest window. With features from the cache mel_frames and max_window
    are 0, and encoder_frames counts the frames that are kept. teacher: shape of the row that a teacher reads.
    """

    tokens: int
    segments: int
    max_length: int
    supervised: int
    audio_tokens: int = 0
    encoder_frames: int = 0
    mel_frames: int = 0
    windows: int = 0
    max_window: int = 0
    teacher: "PackShape | None" = None

    def __post_init__(self):
        if self.teacher is not None and self.teacher.supervised != self.supervised:
            raise ValueError(
                f"the teacher has {self.teacher.supervised} supervised positions, the pack {self.supervised}"
            )

    @property
    def audio(self) -> AudioSizes:
        return AudioSizes(
            windows=self.windows,
            mel_frames=self.mel_frames,
            encoder_frames=self.encoder_frames,
            max_window=self.max_window,
            tokens=self.audio_tokens,
        )

    @property
    def waveform_samples(self) -> int:
        """Length of the row that holds the windows with their margins."""
        return self.audio.samples if self.mel_frames else 0


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """Samples end to end in one row, or one padded row each.

    input_ids: int64 [rows, columns], 0 at placeholders. real: bool [rows, columns], False at the padding of a packed
    row. position_ids: int64 [1, tokens], restarting at 0 in each segment. cu_seq_lens: int32 [segments + 1], borders of
    the segments; cu_seq_lens_host: the same on the host; segment_blocks: their table (`model.segment_blocks`). Padded
    rows have None for these four, and attention_mask, int64 [rows, columns]. max_length: tokens of the longest segment,
    or more.

    positions: int64 [supervised], index of the hidden state that predicts each target, in the flattened rows; one past
    the last for padding. targets: int64 [supervised], -100 for padding. segments: int64 [supervised], the sample of
    each target; the number of segments for padding.
    """

    input_ids: Tensor
    real: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    cu_seq_lens: Tensor | None
    cu_seq_lens_host: tuple[int, ...] | None
    segment_blocks: Tensor | None
    max_length: int
    positions: Tensor
    targets: Tensor
    segments: Tensor

    def keywords(self) -> dict:
        """Keyword arguments for the language model's attention."""
        if self.cu_seq_lens is None:
            return {"attention_mask": self.attention_mask}
        return {
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seq_lens,
            "cu_seq_lens_k": self.cu_seq_lens,
            "max_length_q": self.max_length,
            "max_length_k": self.max_length,
            "cu_seq_lens_host": self.cu_seq_lens_host,
            "segment_blocks": self.segment_blocks,
        }


@dataclass(frozen=True, kw_only=True)
class AudioPart:
    """row: float32 [samples], the windows with their margins, see `audio_layout.waveform_row`. positions: int64 [audio
    tokens], indices of the placeholders in the flattened text rows; one past the last for padding.

    frames: instead of a row, the encoder's output from the feature cache [encoder frames, d_model], zeros for padding;
    float16, or int8 with scales, float16 [encoder frames].
    """

    row: Tensor | None
    layout: AudioLayout
    positions: Tensor
    frames: Tensor | None = None
    scales: Tensor | None = None

    @property
    def unencoded(self) -> tuple[Tensor, MelLayout, EncoderLayout]:
        """The row, with the indices of mel and encoder. There must be one."""
        assert self.row is not None and self.layout.mel is not None and self.layout.encoder is not None
        return self.row, self.layout.mel, self.layout.encoder

    @property
    def known_frames(self) -> Tensor | None:
        """`frames` as the projector reads them; int8 times its scale is exact in float32, on any device."""
        if self.frames is None or self.scales is None:
            return self.frames
        return self.frames.float() * self.scales.float()[:, None]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """teacher: the row that a teacher reads; its supervised positions have the order of the batch's."""

    shape: PackShape
    text: TextPart
    audio: AudioPart | None = None
    teacher: "Batch | None" = None

    @property
    def teacher_position(self) -> Tensor | None:
        """int64 [supervised], index in the teacher's row that predicts the same token; one past the last for none."""
        return None if self.teacher is None else self.teacher.text.positions

    @property
    def taught(self) -> Tensor | None:
        """bool [supervised], which positions have a teacher."""
        return None if self.teacher is None else self.teacher.text.targets != IGNORE_INDEX

    def to(self, device: torch.device | str, encoder_device: torch.device | str | None = None) -> "Batch":
        """A copy on the device, without a wait if this one is pinned. encoder_device: the encoder's device, if it is
        another.
        """
        moved = on_device(self, device)
        if self.audio is None or self.audio.row is None or encoder_device in (None, device):
            return moved
        audio = on_device(self.audio, encoder_device)
        positions, groups = (
            tensor.to(device, non_blocking=True) for tensor in (self.audio.positions, self.audio.layout.groups)
        )
        return replace(moved, audio=replace(audio, positions=positions, layout=replace(audio.layout, groups=groups)))


def taught_by(samples: Sequence[Sample]) -> list[Sample]:
    """The rows that the teachers of these samples read."""
    return [sample.teacher for sample in samples if sample.teacher is not None]


def pack_shape(samples: Sequence[Sample], frames: FrameArithmetic, *, teach: bool = False) -> PackShape:
    """The exact sizes of a pack of these samples. teach: include the rows of their teachers, if any."""
    supervised = sum(sample.num_supervised for sample in samples)
    teachers = taught_by(samples) if teach else []
    audio = sizes_of([window for sample in samples for window in sample.windows], frames)
    return PackShape(
        tokens=sum(len(sample.input_ids) for sample in samples),
        segments=len(samples),
        max_length=max(len(sample.input_ids) for sample in samples),
        supervised=supervised,
        audio_tokens=audio.tokens,
        encoder_frames=audio.encoder_frames,
        mel_frames=audio.mel_frames,
        windows=audio.windows,
        max_window=audio.max_window,
        teacher=replace(pack_shape(teachers, frames), supervised=supervised) if teachers else None,
    )


def packed_batch(
    samples: Sequence[Sample],
    frames: FrameArithmetic,
    audio_token_id: int,
    *,
    teach: bool = False,
    shape: PackShape | None = None,
) -> Batch:
    """Samples end to end in one row, on the host. shape: larger sizes. Raises ValueError if the samples don't fit."""
    shape = shape or pack_shape(samples, frames, teach=teach)
    if teach and shape.teacher is None and taught_by(samples):
        raise ValueError("the samples have teachers, but the shape has none")
    teacher = None
    if shape.teacher is not None:
        teacher = _packed([sample.teacher for sample in samples], samples, frames, audio_token_id, shape.teacher)
    return replace(_packed(samples, samples, frames, audio_token_id, shape), teacher=teacher)


def padded_batch(
    samples: Sequence[Sample],
    frames: FrameArithmetic,
    audio_token_id: int,
    pad_token_id: int,
    *,
    teach: bool = False,
    multiple_of: int = 1,
) -> Batch:
    """One row for each sample, padded on the right to a multiple of `multiple` tokens, on the host. For language models
    that can't keep the samples of one row apart.
    """
    shape = pack_shape(samples, frames, teach=teach)
    teacher = None
    if shape.teacher is not None:
        read = [sample.teacher for sample in samples]
        teacher = _padded(read, samples, frames, audio_token_id, pad_token_id, multiple_of, shape.teacher)
    batch = _padded(samples, samples, frames, audio_token_id, pad_token_id, multiple_of, shape)
    return replace(batch, teacher=teacher)


def _packed(
    rows: Sequence[Sample | None],
    samples: Sequence[Sample],
    frames: FrameArithmetic,
    audio_token_id: int,
    shape: PackShape,
) -> Batch:
    """The rows end to end: the samples, or what the teacher of each reads."""
    lengths = [0 if row is None else len(row.input_ids) for row in rows]
    ids = np.zeros(shape.tokens, dtype=np.int64)
    ends = np.cumsum([0, *lengths])
    full = [length for length in lengths if length]
    segments = [*full, *padding_segments(full, shape.tokens, shape.segments, shape.max_length)]
    for row, start, end in zip(rows, ends, ends[1:], strict=False):
        if row is not None:
            ids[start:end] = row.input_ids
    placeholders = np.flatnonzero(ids == audio_token_id)
    ids[placeholders] = 0
    borders = np.cumsum([0, *segments]).tolist()
    borders += [shape.tokens] * (shape.segments + 1 - len(borders))
    text = TextPart(
        input_ids=torch.from_numpy(ids)[None],
        real=(torch.arange(shape.tokens) < ends[-1])[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in segments]))[None],
        attention_mask=None,
        cu_seq_lens=torch.tensor(borders, dtype=torch.int32),
        cu_seq_lens_host=tuple(borders),
        segment_blocks=segment_blocks(borders),
        max_length=shape.max_length,
        **_supervised(rows, ends, samples, shape, nowhere=shape.tokens),
    )
    return Batch(shape=shape, text=text, audio=_audio(rows, placeholders, frames, shape, nowhere=shape.tokens))


def _padded(
    rows: Sequence[Sample | None],
    samples: Sequence[Sample],
    frames: FrameArithmetic,
    audio_token_id: int,
    pad_token_id: int,
    multiple_of: int,
    shape: PackShape,
) -> Batch:
    """The same, one row for each; a missing one is a row of padding."""
    lengths = [0 if row is None else len(row.input_ids) for row in rows]
    columns = -(-max(lengths) // multiple_of) * multiple_of
    ids = np.full((len(rows), columns), pad_token_id)
    for number, row in enumerate(rows):
        if row is not None:
            ids[number, : lengths[number]] = row.input_ids
    placeholders = np.flatnonzero(ids == audio_token_id)
    ids.reshape(-1)[placeholders] = 0
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    text = TextPart(
        input_ids=torch.from_numpy(ids),
        real=torch.ones_like(mask),  # the attention mask excludes padding
        position_ids=None,
        attention_mask=mask.long(),
        cu_seq_lens=None,
        cu_seq_lens_host=None,
        segment_blocks=None,
        max_length=columns,
        **_supervised(rows, np.arange(len(rows)) * columns, samples, shape, nowhere=ids.size),
    )
    return Batch(shape=shape, text=text, audio=_audio(rows, placeholders, frames, shape, nowhere=ids.size))


def _supervised(
    rows: Sequence[Sample | None],
    starts: Sequence[int] | np.ndarray,
    samples: Sequence[Sample],
    shape: PackShape,
    *,
    nowhere: int,
) -> dict[str, Tensor]:
    """positions, targets and segments of a `TextPart`, in the order of the samples' supervised tokens."""
    counts = [sample.num_supervised for sample in samples]
    if sum(counts) > shape.supervised:
        raise ValueError(f"{sum(counts)} supervised tokens do not fit into {shape.supervised}")
    positions = np.full(shape.supervised, nowhere)
    targets = np.full(shape.supervised, IGNORE_INDEX)
    segments = np.full(shape.supervised, shape.segments)
    first = 0
    for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
        here = slice(first, first + count)
        first += count
        if row is None:
            continue
        found = np.flatnonzero(row.labels[1:] != IGNORE_INDEX)
        if len(found) != count:
            raise ValueError(f"{row.id}: its teacher has {len(found)} supervised tokens, not {count}")
        positions[here] = starts[number] + found
        targets[here] = row.labels[1:][found]
        segments[here] = number
    return {
        "positions": torch.from_numpy(positions),
        "targets": torch.from_numpy(targets),
        "segments": torch.from_numpy(segments),
    }


def _audio(
    rows: Sequence[Sample | None], placeholders: np.ndarray, frames: FrameArithmetic, shape: PackShape, *, nowhere: int
) -> AudioPart | None:
    """Raises ValueError if the number of placeholders is not that of the audio tokens."""
    windows = [window for row in rows if row is not None for window in row.windows]
    lengths, sizes = [len(window) for window in windows], shape.audio
    needed = sizes_of(windows, frames)
    if len(placeholders) != needed.tokens:
        raise ValueError(
            f"{len(placeholders)} audio placeholders in {', '.join(row.id for row in rows if row is not None)}, but "
            f"the audio gives {needed.tokens} tokens: encode both for this model, whose configuration has silence, "
            "stack and audio_token_id"
        )
    if (
        needed.mel_frames > sizes.mel_frames
        or needed.encoder_frames > sizes.encoder_frames
        or needed.tokens > sizes.tokens
    ):
        raise ValueError(f"{needed} does not fit into {sizes}")
    if not sizes.windows:
        return None
    positions = np.full(sizes.tokens, nowhere)
    positions[: len(placeholders)] = placeholders
    if encoded := encoded_windows(windows):
        values, scales = frames_of(encoded, sizes.encoder_frames)
        return AudioPart(
            row=None,
            layout=kept_layout(lengths, frames, sizes),
            positions=torch.from_numpy(positions),
            frames=values,
            scales=scales,
        )
    return AudioPart(
        row=waveform_row([window for window in windows if isinstance(window, np.ndarray)], sizes),
        layout=audio_layout(lengths, frames, sizes),
        positions=torch.from_numpy(positions),
    )
