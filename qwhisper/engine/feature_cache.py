"""`--feature_cache`: the samples of a step take the features of the frozen encoder from the disk, or add theirs to it.

A clip that the cache lacks is encoded before the step, rounded as it is stored, and used with that rounding: a later
epoch, or a resumed run, reads the same bits. The step itself then sees no waveform and runs no encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from qwhisper.data.feature_store import EncodedWindow, FeatureWriter, InMemory
from qwhisper.data.features import CachedClip, FeatureReader, kept
from qwhisper.data.packing import plan_packs
from qwhisper.data.rows import Sample, Uncached
from qwhisper.engine.executor import Executor
from qwhisper.report.kinds import CachedFeaturesDamaged, Event, FeaturesNotCached, OutOfMemory

LARGEST_INT8 = 127


@dataclass(eq=False)
class _Clip:
    """A clip to encode, and the places in samples that wait for it."""

    uncached: Uncached
    windows: list[np.ndarray]
    places: list[tuple[Sample, int]] = field(default_factory=list)  # (sample, its first window)

    def give(self, windows: Sequence[EncodedWindow]) -> None:
        for sample, first in self.places:
            sample.windows[first : first + len(windows)] = windows


@dataclass
class FeatureCache:
    """reader: finds clips, also in the processes that read dialogues. writer: None if another run writes, or after an
    error of the disk.
    """

    executor: Executor
    reader: FeatureReader
    writer: FeatureWriter | None

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    @torch.no_grad()
    def complete(self, samples: Sequence[Sample]) -> list[Event]:
        """Encode the windows of the samples that are not encoded, and keep them. Returns what there is to report.

        Raises MemoryLimitError, and what `Executor.before_pack` raises; the samples are unchanged then.
        """
        events: list[Event] = []
        clips = _waiting(samples)
        if damaged := [clip.uncached.name for clip in clips if clip.uncached.missing.bad is not None]:
            events.append(CachedFeaturesDamaged(clips=damaged))
        unknown = [clip for clip in clips if not self._found_since(clip)]
        if unknown:
            with self.executor.plainly():  # of any shape
                encoded, halvings = self.executor.within_memory(lambda: self._encode(unknown), samples, lambda: None)
            events += [OutOfMemory(tokens=halved.tokens, max_tokens_per_pack=halved.now) for halved in halvings]
            for clip in unknown:
                events += self._keep(clip.uncached, encoded[clip])
                clip.give(self._windows(clip, encoded[clip]))
        for sample in samples:
            sample.uncached = []
        return events

    def _found_since(self, clip: _Clip) -> bool:
        """Take a record that was written after the clip's dialogue was read ahead, if there is one."""
        missing = clip.uncached.missing
        if missing.key is None:
            return False
        if missing.bad is not None:
            self.reader.found.forget(missing.bad)
        found = self.reader.find_key(missing.key)
        if not isinstance(found, CachedClip):
            return False
        clip.give(found.windows)
        return True

    def _encode(self, clips: Sequence[_Clip]) -> dict[_Clip, InMemory]:
        """The features of each clip as they are stored, its windows end to end; those of a pack's samples at once."""
        of_sample: dict[Sample, list[_Clip]] = {}
        for clip in clips:
            of_sample.setdefault(clip.places[0][0], []).append(clip)
        samples = list(of_sample)
        found = {}
        for pack in plan_packs([len(sample.input_ids) for sample in samples], self.executor.max_tokens_per_pack):
            self.executor.before_pack()
            chunk = [clip for index in pack for clip in of_sample[samples[index]]]
            windows = [window for clip in chunk for window in clip.windows]
            waveforms = torch.from_numpy(np.concatenate(windows))
            frames, lengths = self.executor.model.model.encode_audio(waveforms, list(map(len, windows)))
            values, scales = rounded(frames, self.reader.found.stored_as)
            ends = np.cumsum([0, *lengths])[np.cumsum([0, *(len(clip.windows) for clip in chunk)])]
            for clip, (first, end) in zip(chunk, pairwise(ends), strict=True):
                found[clip] = InMemory(values[first:end], None if scales is None else scales[first:end])
        return found

    def _windows(self, clip: _Clip, rows: InMemory) -> list[EncodedWindow]:
        """The features of a clip, window by window."""
        found, first = [], 0
        for length, count in kept(clip.uncached.num_samples, self.reader.frames):
            here = slice(first, first + count)
            part = InMemory(rows.values[here], None if rows.scales is None else rows.scales[here])
            found.append(self.reader.window(length, count, part))
            first += count
        return found

    def _keep(self, clip: Uncached, rows: InMemory) -> list[Event]:
        """Write the features, if they are finite. After an error of the disk no more are written."""
        measured = rows.values if rows.scales is None else rows.scales
        if self.writer is None or clip.missing.key is None or not np.isfinite(measured).all():
            return []
        try:
            self.writer.append(clip.missing.key, clip.num_samples, rows, clip.notes)
        except OSError as error:
            self.close()
            return [FeaturesNotCached(error=str(error))]
        return []


def rounded(frames: Tensor, stored_as: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Frames [frames, d_model] as the cache stores them, on the host: values float16, or int8 and a scale for each
    frame, float16 [frames]: its largest magnitude / 127. A frame that is not finite gets a scale that is not.
    """
    if stored_as == "fp16":
        return frames.half().cpu().numpy(), None
    frames = frames.float()
    scales = (frames.abs().amax(-1) / LARGEST_INT8).half()
    divisors = scales.float().where((scales > 0) & scales.isfinite(), 1.0)[:, None]
    values = (frames / divisors).nan_to_num().round().clamp(-LARGEST_INT8, LARGEST_INT8)
    return values.to(torch.int8).cpu().numpy(), scales.cpu().numpy()


def _waiting(samples: Sequence[Sample]) -> list[_Clip]:
    """Each clip that is not encoded, once, in the order of the samples."""
    clips: dict[object, _Clip] = {}
    for sample in samples:
        for uncached in sample.uncached:
            here = sample.windows[uncached.first : uncached.first + uncached.count]
            windows = [window for window in here if isinstance(window, np.ndarray)]
            name = uncached.missing.key or (sample, uncached.first)
            clips.setdefault(name, _Clip(uncached, windows)).places.append((sample, uncached.first))
    return list(clips.values())
