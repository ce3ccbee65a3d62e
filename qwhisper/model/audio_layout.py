"""Indices of the audio path, made on the host from window lengths alone.

Log-mel, encoder and projector compute from these tensors without waiting for a device. Their shapes follow from
`AudioSizes`, so a batch can be rounded up to sizes that occur again; the entries added then point at rows of zeros.
All index tensors are int64 unless they say otherwise.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from qwhisper.frames import CONV_STRIDE, HOP_LENGTH, N_FFT, FrameArithmetic, encoder_frames, mel_frames
from qwhisper.model.segment_blocks import segment_blocks

MARGIN_HOPS = 2  # of a window in the row, beyond one hop a frame: its last frame reaches 240 samples further
Layout = TypeVar("Layout")
on_the_host = torch.compiler.disable  # NumPy, which torch.compile would trace and get wrong
END_HOPS = 3  # zeros at the row's end, which padding frames point at


@dataclass(frozen=True, kw_only=True)
class AudioSizes:
    """Sizes of the audio of a batch. encoder_frames: of all windows, before the silence is dropped; max_window: of the
    longest. tokens: after the projector.
    """

    windows: int = 0
    mel_frames: int = 0
    encoder_frames: int = 0
    max_window: int = 0
    tokens: int = 0

    @property
    def samples(self) -> int:
        """Of the row that the windows are laid into."""
        return HOP_LENGTH * (self.mel_frames + MARGIN_HOPS * self.windows + END_HOPS)

    @property
    def conv_slots(self) -> int:
        """Mel frames, and the empty ones between windows, that the convolutions read."""
        return CONV_STRIDE * (self.encoder_frames + self.windows)


@dataclass(frozen=True)
class MelLayout:
    """frames: [mel frames], which frame of the row each is. windows: [mel frames], the window of each, `num_windows`
    for padding.
    """

    frames: Tensor
    windows: Tensor
    num_windows: int


@dataclass(frozen=True)
class EncoderLayout:
    """mel: [conv slots], the mel frame in each slot; the number of mel frames if it is empty. slots: [encoder
    frames], where each lies behind the convolutions. positions: [encoder frames], within their windows. cu_seq_lens:
    int32 [windows + 1], borders of the windows; cu_seq_lens_host: the same on the host, or None. segment_blocks: table
    of these segments, see `model.segment_blocks`. max_length: frames of the longest window, or more.
    """

    mel: Tensor
    slots: Tensor
    positions: Tensor
    cu_seq_lens: Tensor
    cu_seq_lens_host: tuple[int, ...] | None
    segment_blocks: Tensor
    max_length: int


@dataclass(frozen=True)
class AudioLayout:
    """All indices from a row of samples to audio tokens. groups: [tokens, stack], the encoder frames that the projector
    joins; a missing frame has the number of encoder frames as its index. mel, encoder: None if the encoder's output is
    given, see `kept_layout`.
    """

    mel: MelLayout | None
    encoder: EncoderLayout | None
    groups: Tensor


def audio_sizes(lengths: Sequence[int], arithmetic: FrameArithmetic) -> AudioSizes:
    """Exact sizes of windows of these lengths, in samples, silence included."""
    mel = [mel_frames(n) for n in lengths]
    frames = [encoder_frames(n) for n in mel]
    return AudioSizes(
        windows=len(frames),
        mel_frames=sum(mel),
        encoder_frames=sum(frames),
        max_window=max(frames, default=0),
        tokens=sum(arithmetic.window_tokens(n) for n in lengths),
    )


def audio_layout(lengths: Sequence[int], arithmetic: FrameArithmetic, sizes: AudioSizes | None = None) -> AudioLayout:
    """lengths: samples of each window, silence included. sizes: exact or larger ones; None: the exact ones.

    Raises ValueError if the windows do not fit into the sizes.
    """
    sizes = sizes or audio_sizes(lengths, arithmetic)
    mel = [mel_frames(n) for n in lengths]
    frames = [encoder_frames(n) for n in mel]
    starts = np.cumsum([0, *frames])
    kept = [arithmetic.kept_frames(n) for n in frames]
    spans = [(start + part.start, start + part.stop) for start, part in zip(starts, kept, strict=False)]
    return AudioLayout(
        mel=mel_layout(lengths, sizes),
        encoder=encoder_layout(mel, sizes),
        groups=stack_groups(spans, arithmetic.stack, nothing=sizes.encoder_frames, tokens=sizes.tokens),
    )


def kept_sizes(lengths: Sequence[int], arithmetic: FrameArithmetic) -> AudioSizes:
    """Exact sizes of windows whose encoder frames are known: encoder_frames counts those that are kept."""
    kept = [arithmetic.kept_frames(encoder_frames(mel_frames(n))) for n in lengths]
    return AudioSizes(
        windows=len(kept),
        encoder_frames=sum(part.stop - part.start for part in kept),
        tokens=sum(arithmetic.window_tokens(n) for n in lengths),
    )


def kept_layout(lengths: Sequence[int], arithmetic: FrameArithmetic, sizes: AudioSizes) -> AudioLayout:
    """The layout of kept encoder frames, windows end to end. sizes: of `kept_sizes`, or larger."""
    counts = [kept_sizes([n], arithmetic).encoder_frames for n in lengths]
    ends = np.cumsum([0, *counts]).tolist()
    spans = list(pairwise(ends))
    groups = stack_groups(spans, arithmetic.stack, nothing=sizes.encoder_frames, tokens=sizes.tokens)
    return AudioLayout(mel=None, encoder=None, groups=groups)


@on_the_host
def waveform_row(windows: Iterable[np.ndarray], sizes: AudioSizes) -> Tensor:
    """[samples of the row] float32, of windows float32 [samples] each, on the host; zeros between them.

    Each window begins at a multiple of the hop with the reflected margin that Whisper's STFT pads it with, so that its
    mel frames are frames of the row.
    """
    row = np.zeros(sizes.samples, dtype=np.float32)
    margin, place = N_FFT // 2, 0
    for window in windows:
        frames = mel_frames(len(window))
        if len(window) < N_FFT:
            window = np.pad(window, (0, N_FFT - len(window)))
        begin, end = place + margin, place + (frames - 1) * HOP_LENGTH + N_FFT  # of the window; of its last frame
        row[place:begin] = window[margin:0:-1]
        kept = min(len(window), end - begin)
        row[begin : begin + kept] = window[:kept]
        if rest := end - begin - kept:
            row[begin + kept : end] = window[-rest - 1 : -1][::-1]
        place += (frames + MARGIN_HOPS) * HOP_LENGTH
    return torch.from_numpy(row)


@on_the_host
def mel_layout(lengths: Sequence[int], sizes: AudioSizes) -> MelLayout:
    """lengths: samples of each window."""
    mel = [mel_frames(n) for n in lengths]
    nothing = sizes.mel_frames + MARGIN_HOPS * sizes.windows  # the frame of zeros at the row's end
    frames = np.full(sizes.mel_frames, nothing)
    windows = np.full(sizes.mel_frames, sizes.windows)
    first = 0
    for number, length in enumerate(mel):
        frames[first : first + length] = np.arange(first, first + length) + MARGIN_HOPS * number
        windows[first : first + length] = number
        first += length
    return MelLayout(torch.from_numpy(frames), torch.from_numpy(windows), sizes.windows)


@on_the_host
def encoder_layout(mel_lengths: Sequence[int], sizes: AudioSizes | None = None) -> EncoderLayout:
    """mel_lengths: mel frames of each window. sizes: see `audio_layout`.

    Windows start at even slots, so that the stride-2 convolution meets each at its own first frame, with at least one
    empty slot between two: the zero padding that a window alone would have.
    """
    frames = [encoder_frames(n) for n in mel_lengths]
    if sizes is None:
        sizes = AudioSizes(
            windows=len(frames), mel_frames=sum(mel_lengths), encoder_frames=sum(frames), max_window=max(frames)
        )
    segments = [*frames, *padding_segments(frames, sizes.encoder_frames, sizes.windows, sizes.max_window)]
    starts = np.cumsum([0, *(n + 1 for n in segments)])[:-1]  # behind the convolutions; an empty one after each
    mel = np.full(sizes.conv_slots, sizes.mel_frames)
    first = 0
    for start, length in zip(CONV_STRIDE * starts, mel_lengths, strict=False):
        mel[start : start + length] = np.arange(first, first + length)
        first += length
    borders = np.cumsum([0, *segments]).tolist()
    borders += [sizes.encoder_frames] * (sizes.windows + 1 - len(borders))
    positions = np.concatenate([np.arange(n) for n in segments])
    return EncoderLayout(
        mel=torch.from_numpy(mel),
        slots=torch.from_numpy(np.repeat(starts, segments) + positions),
        positions=torch.from_numpy(positions),
        cu_seq_lens=torch.tensor(borders, dtype=torch.int32),
        cu_seq_lens_host=tuple(borders),
        segment_blocks=segment_blocks(borders),
        max_length=sizes.max_window,
    )


@on_the_host
def stack_groups(spans: Sequence[tuple[int, int]], stack: int, *, nothing: int, tokens: int | None = None) -> Tensor:
    """[tokens, stack] of spans (start, end) of encoder frames, one a window, whose last group is filled up with
    `nothing`. tokens: as many as there are groups, or more.
    """
    counts = [-(-(end - start) // stack) for start, end in spans]
    groups = np.full((sum(counts) if tokens is None else tokens, stack), nothing)
    first = 0
    for (start, end), count in zip(spans, counts, strict=True):
        groups.reshape(-1)[first * stack : first * stack + end - start] = np.arange(start, end)
        first += count
    return torch.from_numpy(groups)


@on_the_host
def window_lengths(mask: Tensor) -> list[int]:
    """Mel frames of each window of clips, one clip a row: the runs of ones of a mask [clips, mel frames], in order.

    The mask lies on the host.
    """
    edges = torch.nn.functional.pad(mask.bool().to(torch.int8), (1, 1)).diff().flatten()
    return ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten().tolist()


def padding_segments(lengths: Sequence[int], total: int, segments: int, longest: int) -> list[int]:
    """Lengths of the segments, at most `longest` each, that fill segments of `lengths` up to `total`.

    Raises ValueError if they do not fit into `segments` of that length.
    """
    rest, spare = total - sum(lengths), segments - len(lengths)
    if min(rest, spare) < 0 or max(lengths, default=0) > longest or rest > spare * longest:
        raise ValueError(
            f"segments of {sum(lengths)} rows (the longest of {max(lengths, default=0)}) do not fit into {segments} "
            f"segments of {total} rows and at most {longest}, with room for {rest} rows of padding in {spare} segments"
        )
    return [min(longest, rest - start) for start in range(0, rest, longest)] if rest else []


def with_zero_row(rows: Tensor) -> Tensor:
    """[rows + 1, size]: `rows` and a row of zeros, which padding indices point at."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def on_device(layout: Layout, device: torch.device | str) -> Layout:
    """A copy of a dataclass with all of its tensors, also those of dataclasses in it, on the device.

    Waits for the device only if a tensor on the host is not pinned.
    """
    return with_tensors(layout, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(layout: Layout) -> Layout:
    """A copy of a dataclass on the host with its tensors in pinned memory, from which copies to a GPU need no wait."""
    return with_tensors(layout, Tensor.pin_memory)


def with_tensors(layout: Layout, change: Callable[[Tensor], Tensor]) -> Layout:
    """A copy of a dataclass with all of its tensors, also those of dataclasses in it, changed."""
    moved: dict[str, Any] = {}
    for field in fields(layout):  # type: ignore[arg-type]
        value = getattr(layout, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = change(value)
        elif is_dataclass(value):
            moved[field.name] = with_tensors(value, change)
    return replace(layout, **moved)  # type: ignore[type-var]
