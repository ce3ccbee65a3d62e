"""How fast --feature_cache is filled and read, with features of the shape of Whisper turbo's; one JSON line.

    python benchmarks/feature_cache.py --folder DIR [--clips 1024] [--workers 1 4 8] [--dtype int8]
    python benchmarks/feature_cache.py --error WHISPER_DIR --recordings DIR

Clips are files of random bytes, as long as 1 to 30 s of sound (8.4 s on average), features random numbers. Reading is
the product's: processes hash each file, find its record and compare the checksum; this process copies the frames of a
pack of 44 clips into one tensor, pinned if there is a GPU. "cold": after the kernel has dropped the files' pages.

--error measures the rounding of each format on real weights and recordings instead: the root mean square of the error
relative to that of the features, which bf16 is listed for, and the largest error relative to the frame's own largest.
"""

import argparse
import itertools
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from qwhisper.data.clips import AudioClip
from qwhisper.data.feature_store import SCALE, STORED_AS, FeatureFolder, FeatureWriter, InMemory
from qwhisper.data.features import CachedClip, FeatureReader, kept
from qwhisper.data.processes import work_ahead
from qwhisper.frames import DEFAULT_LEAD_SILENCE_S, DEFAULT_TAIL_SILENCE_S, SAMPLE_RATE, FrameArithmetic

FRAMES = FrameArithmetic(lead_silence_s=DEFAULT_LEAD_SILENCE_S, tail_silence_s=DEFAULT_TAIL_SILENCE_S)
A_STEP, A_PACK = 128, 44


def clips_of(folder: Path, count: int) -> list[tuple[AudioClip, int]]:
    """(clip, samples at 16 kHz). A file of 16-bit samples has two bytes a sample."""
    generator, clips = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        num_samples = int(SAMPLE_RATE * min(30.0, 1 + generator.exponential(7.4)))
        path = folder.resolve() / f"{number}.wav"
        if not path.exists():
            path.write_bytes(generator.bytes(2 * num_samples))
        clips.append((AudioClip(str(path)), num_samples))
    return clips


def fill(reader: FeatureReader, clips: list[tuple[AudioClip, int]]) -> float:
    """Seconds."""
    generator, found = np.random.default_rng(1), reader.found
    most = sum(count for _, count in kept(30 * SAMPLE_RATE, FRAMES))
    values = generator.standard_normal((most, found.width)).astype(np.float16)
    values = values if found.stored_as == "fp16" else (100 * values).clip(-127, 127).astype(np.int8)
    writer = FeatureWriter(found)
    begun = time.perf_counter()
    for clip, num_samples in clips:
        count = sum(frames for _, frames in kept(num_samples, FRAMES))
        scales = np.ones(count, SCALE) if found.stored_as == "int8" else None
        key = reader.key(clip)
        assert key is not None
        writer.append(key, num_samples, InMemory(values[:count], scales))
    seconds = time.perf_counter() - begun
    writer.close()
    return seconds


def find_all(reader: FeatureReader, clips: list[AudioClip]) -> list[CachedClip]:
    found = [reader.find(clip) for clip in clips]
    assert all(isinstance(clip, CachedClip) for clip in found)
    return found


def read(reader: FeatureReader, clips: list[AudioClip], workers: int, passes: int) -> tuple[float, float]:
    """(seconds, of these in this process for copying) of the passes, after one step."""
    import feature_cache  # the module that workers import

    from qwhisper.engine.encoded_audio import frames_of

    steps = [clips[first : first + A_STEP] for first in range(0, len(clips), A_STEP)]
    tasks = itertools.chain(steps[:1], itertools.chain.from_iterable(itertools.repeat(steps, passes)))
    begun, copying = 0.0, 0.0
    for _, found in work_ahead(partial(feature_cache.find_all, reader), tasks, workers):
        before = time.perf_counter()
        for first in range(0, len(found), A_PACK):
            windows = [window for clip in found[first : first + A_PACK] for window in clip.windows]
            frames_of(windows, sum(window.num_frames for window in windows))
        now = time.perf_counter()
        copying = copying + now - before if begun else 0.0
        begun = begun or now
    return time.perf_counter() - begun, copying


def forget_pages(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def speed(args: argparse.Namespace) -> dict:
    clips = clips_of(args.folder / "clips", args.clips)
    cache = args.folder / "cache"
    if cache.exists():
        shutil.rmtree(cache)
    reader = FeatureReader(FeatureFolder(cache, args.width, args.dtype), FRAMES, b"benchmark")
    seconds = fill(reader, clips)
    size = sum(path.stat().st_size for path in cache.iterdir())
    result = {
        "dtype": args.dtype,
        "clips": args.clips,
        "width": args.width,
        "mb_per_clip": round(size / args.clips / 1e6, 3),
        "fill_mb_s": round(size / seconds / 1e6),
        "fill_clips_s": round(args.clips / seconds),
    }
    named = [clip for clip, _ in clips]
    for heat in ("warm", "cold"):
        for workers in args.workers:
            if heat == "cold":
                forget_pages(args.folder)
            passes = args.passes if heat == "warm" else 1
            seconds, copying = read(reader, named, workers, passes)
            result[f"{heat}_{workers}_workers"] = {
                "clips_s": round(passes * args.clips / seconds),
                "mb_s": round(passes * size / seconds / 1e6),
                "copy_mb_s": round(passes * size / copying / 1e6),
            }
    return result


def error(args: argparse.Namespace) -> dict:
    import torch

    from qwhisper.data.audio import load_audio
    from qwhisper.data.windows import clip_windows
    from qwhisper.engine.feature_cache import rounded
    from qwhisper.model.audio_layout import encoder_layout
    from qwhisper.model.bases import load_encoder
    from qwhisper.model.mel import packed_log_mel

    encoder = load_encoder(str(args.error), dtype=torch.float32, device=torch.device("cpu"))
    files = sorted(args.recordings.rglob("*.wav"))[:: args.every]
    sums = dict.fromkeys(("features", "bf16", *STORED_AS), 0.0)
    worst = dict.fromkeys(sums, 0.0)
    largest = 0.0
    for file in files:
        (window,) = clip_windows(load_audio(str(file)), FRAMES)
        with torch.no_grad():
            mel, lengths = packed_log_mel(torch.from_numpy(window), [len(window)], encoder.config.num_mel_bins)
            frames = encoder(mel, encoder_layout(lengths)).last_hidden_state.float()
        frames = frames[FRAMES.kept_frames(len(frames))]
        largest = max(largest, float(frames.abs().max()))
        found = {"features": 0 * frames, "bf16": frames.bfloat16().float()}
        for name in STORED_AS:
            values, scales = (None if part is None else torch.from_numpy(part) for part in rounded(frames, name))
            found[name] = values.float() if scales is None else values.float() * scales.float()[:, None]
        for name, close in found.items():
            difference = (frames - close).abs()
            sums[name] += float(difference.double().square().mean())
            worst[name] = max(worst[name], float((difference.amax(-1) / frames.abs().amax(-1)).max()))
    relative = {name: round((sums[name] / sums["features"]) ** 0.5, 7) for name in sums if name != "features"}
    return {
        "encoder": args.error.name,
        "recordings": len(files),
        "largest": round(largest, 2),
        "relative_rms_error": relative,
        "worst_of_largest": {name: round(worst[name], 6) for name in relative},
    }


def main() -> None:
    from common import append_result

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--clips", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dtype", choices=STORED_AS, default="fp16")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--error", type=Path, help="a Whisper")
    parser.add_argument("--recordings", type=Path, help="a folder of WAV files")
    parser.add_argument("--every", type=int, default=20, help="of these files")
    args = parser.parse_args()
    if (args.error is None) == (args.folder is None) or (args.error and not args.recordings):
        sys.exit("give --folder, or --error and --recordings")
    append_result("feature_cache", speed(args) if args.folder else error(args))


if __name__ == "__main__":
    main()
