"""Opens `--feature_cache` for a run: what its features depend on, what is there already, and room on the disk."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwhisper.checksums import checksums
from qwhisper.data.clips import AudioClip
from qwhisper.data.dialogue import Dialogue
from qwhisper.data.feature_store import INDEX_FILE, FeatureFolder, FeatureWriter, frame_bytes
from qwhisper.data.features import FeatureReader, kept
from qwhisper.data.lengths import length_by_header
from qwhisper.data.processes import Poll
from qwhisper.disk import write_whole
from qwhisper.engine.executor import Executor
from qwhisper.engine.feature_cache import FeatureCache
from qwhisper.errors import UsageError
from qwhisper.frames import KEPT_SILENCE_FRAMES
from qwhisper.model.mel import MEL_VERSION
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.report.terminal import note, say
from qwhisper.train.arguments import TrainArguments

SURVEYED = 2000  # clips that are looked at before the run; hashing them reads about 0.5 GB
SETTINGS_FILE = "settings.json"
ARCHITECTURE = (  # fields of the encoder's configuration that its output depends on, besides its weights
    "activation_function",
    "d_model",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "encoder_layers",
    "max_source_positions",
    "num_mel_bins",
    "scale_embedding",
)


@dataclass(frozen=True)
class Survey:
    """What a cache has of the clips of a run. looked_at: if less than `clips`, the rest is extrapolated from these.
    present: of those looked at. bytes, missing_bytes: of all clips, and of those that are missing.
    """

    clips: int
    looked_at: int
    present: int
    bytes: int
    missing_bytes: int

    def __str__(self) -> str:
        size = f"{in_bytes(self.bytes)} in all"
        if self.looked_at == self.clips:
            return f"{self.present} of {self.clips} clips present, {size}"
        share = self.present / self.looked_at
        return f"about {share:.0%} of {self.clips} clips present ({self.looked_at} looked at), about {size}"


def open_features(
    args: TrainArguments, executor: Executor, dialogues: Sequence[Dialogue], poll: Poll
) -> FeatureCache | None:
    """The cache of a run; None without --feature_cache, or if no dialogue has audio. Prints what it holds.

    Raises UsageError if the disk lacks room for the rest, or if there is no cache and none can be written.
    """
    model = executor.model
    clips = list(dict.fromkeys(clip for dialogue in dialogues for clip in dialogue.clips))
    if args.feature_cache is None or not clips:
        return None
    settings = settings_of(model, args.feature_cache_dtype)
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    folder = Path(args.feature_cache).absolute() / digest.hexdigest()
    found = FeatureFolder(folder, model.config.audio_config.d_model, args.feature_cache_dtype)
    reader = FeatureReader(found, model.config.frames, digest.digest())
    survey = survey_clips(reader, clips, poll)
    say(f"feature cache: {survey}")
    return FeatureCache(executor, reader, writer_of(found, settings, survey))


def writer_of(found: FeatureFolder, settings: dict, survey: Survey) -> FeatureWriter | None:
    """None, with a note, if another run writes or nothing can be written into a cache that exists."""
    folder = found.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_full_disk(folder, survey)
        if not (folder / SETTINGS_FILE).exists():
            write_whole(folder / SETTINGS_FILE, json.dumps(settings, indent=1))
        if (writer := FeatureWriter.open(found)) is None:
            note(f"--feature_cache {folder.parent}: another run fills it; this one reads it and adds nothing")
        return writer
    except OSError as error:
        if not (folder / INDEX_FILE).exists():
            raise UsageError(
                f"--feature_cache {folder.parent}: nothing can be written there ({error}); give another folder"
            ) from None
        note(f"--feature_cache {folder.parent}: it can only be read ({error})")
        return None


def settings_of(model: Qwen3AudioForConditionalGeneration, stored_as: str) -> dict:
    """What the features of a clip depend on besides its sound, as JSON."""
    tower, config = model.model.audio_tower, model.config.audio_config
    weights = checksums([*tower.named_parameters(), *tower.named_buffers()])
    return {
        "encoder_weights": hashlib.blake2b(json.dumps(weights).encode(), digest_size=16).hexdigest(),
        "encoder_dtype": str(tower.conv1.weight.dtype),
        "encoder_config": {name: getattr(config, name) for name in ARCHITECTURE},
        "frames": dataclasses.asdict(model.config.frames) | {"kept_silence_frames": KEPT_SILENCE_FRAMES},
        "mel_version": MEL_VERSION,
        "stored_as": stored_as,
    }


def survey_clips(reader: FeatureReader, clips: Sequence[AudioClip], poll: Poll) -> Survey:
    """Look at up to SURVEYED clips at equal distances. Decodes nothing; lengths come from the files' headers."""
    step = max(1, -(-len(clips) // SURVEYED))
    chosen = clips[::step]
    one = frame_bytes(reader.found.width, reader.found.stored_as)
    sizes = {True: 0, False: 0}  # bytes, by whether they are there
    present, keys = 0, set()
    for clip in chosen:
        poll()
        key = reader.key(clip)
        there = key is not None and reader.found.find(key) is not None
        present += there
        if key is not None and key not in keys:
            sizes[there] += one * sum(count for _, count in kept(length_by_header(clip), reader.frames))
        keys.add(key)
    scale = len(clips) / len(chosen)
    total = round(scale * sum(sizes.values()))
    return Survey(len(clips), len(chosen), present, total, round(scale * sizes[False]))


def refuse_full_disk(folder: Path, survey: Survey) -> None:
    free = shutil.disk_usage(folder).free
    if survey.missing_bytes > free:
        raise UsageError(
            f"--feature_cache {folder.parent}: the missing features take {in_bytes(survey.missing_bytes)}, and the "
            f"disk has {in_bytes(free)} free: make room, give a folder on another disk, or use --feature_cache_dtype "
            "int8, which takes half"
        )


def in_bytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
