"""The audio of a pack whose windows come from the feature cache: sizes, and the frames in one tensor."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwhisper.data.feature_store import STORED_AS, EncodedWindow
from qwhisper.frames import FrameArithmetic
from qwhisper.model.audio_layout import AudioSizes, audio_sizes, kept_sizes


def sizes_of(windows: Sequence[np.ndarray | EncodedWindow], frames: FrameArithmetic) -> AudioSizes:
    lengths = [len(window) for window in windows]
    return kept_sizes(lengths, frames) if encoded_windows(windows) else audio_sizes(lengths, frames)


def encoded_windows(windows: Sequence[np.ndarray | EncodedWindow]) -> list[EncodedWindow]:
    """All windows if they come from the feature cache. Raises ValueError if only some do."""
    encoded = [window for window in windows if isinstance(window, EncodedWindow)]
    if encoded and len(encoded) < len(windows):
        raise ValueError(
            f"{len(encoded)} of {len(windows)} windows are encoded: encode the others first, see FeatureCache.complete"
        )
    return encoded


def frames_of(windows: Sequence[EncodedWindow], num_frames: int) -> tuple[Tensor, Tensor | None]:
    """The windows end to end, read from the cache straight into memory that a GPU can copy from without a wait."""
    width, stored_as = windows[0].width, windows[0].stored_as
    values = _empty(num_frames, width, dtype=getattr(torch, STORED_AS[stored_as].name))
    scales = None if stored_as == "fp16" else _empty(num_frames, dtype=torch.float16)
    first = 0
    for window in windows:
        here = slice(first, first + window.num_frames)
        window.rows.copy_to(values[here].numpy(), None if scales is None else scales[here].numpy())
        first += window.num_frames
    values[first:] = 0
    if scales is not None:
        scales[first:] = 0
    return values, scales


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
    except RuntimeError:  # the memory that may be pinned is limited
        return torch.empty(shape, dtype=dtype)
