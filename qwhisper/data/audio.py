"""Audio files to 16 kHz mono waveforms."""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile

from qwhisper.data.containers import Layout, find_layout
from qwhisper.data.decode import Decoder, FfmpegDecoder, SndfileDecoder, UnreadableError, find_ffmpeg
from qwhisper.data.files import FileBytes, opened
from qwhisper.data.mono import Mono
from qwhisper.errors import BadClipError

# Limits of the stretch that is read. A header that claims more is refused before decoding; if a header claims too
# little, decoding stops at the limit.
MAX_SECONDS = 4 * 3600  # 0.9 GB of waveform
MAX_CHANNELS = 64
SAMPLE_RATES = (1_000, 768_000)
MAX_SAMPLES = 2**33  # of all channels together; an hour of 8 channels at 192 kHz has 5.5e9

BLOCK_SAMPLES = 2**20  # an hour of 48 kHz stereo is 1.4 GB as float32: it is read in blocks, never as a whole
SMALL_BLOCK = 2**12  # frames per block while searching for the end of a damaged file
SILENCE_PEAK = 1e-4  # below this no sample differs from dither
LOUDEST_PEAK = 100.0  # 40 dB above full scale: integers stored as floats, or broken data
MISSING_SECONDS = 0.1  # a decoder's padding, and rounding of stretches; a larger gap is lost speech


def load_audio(
    source: str | Path | bytes,
    start: float | None = None,
    end: float | None = None,
    *,
    channel: int | None = None,
    follow_links: bool = True,
    at_most_s: float = MAX_SECONDS,
    notes: list[str] | None = None,
) -> np.ndarray:
    """The stretch from `start` to `end` (seconds; None: the file's edge) as float32 [samples], mono, 16 kHz.

    source: a path, or the bytes of a whole file. Any sample rate from 1 to 768 kHz, up to 64 channels (their mean, or
    the one numbered `channel`, from 0; if they cancel each other, the loudest), up to `at_most_s` seconds and 2^33
    samples of all channels together. follow_links=False refuses a path with a link in it. notes: remarks for the user
    on how it was read are appended. docs/audio.md lists the formats.

    Raises BadClipError if a limit is exceeded, the path is no file or can't be read or decoded, the channel doesn't
    exist, the stretch is empty or ends more than 0.1 s after the sound, or the sound is not finite, silent or absurdly
    loud.
    """
    name = f"audio of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    wanted = _Wanted(name, start or 0.0, end, channel, at_most_s)
    with faults_named(name):
        try:
            waveform, said = _load(source, wanted, follow_links)
        except (OSError, MemoryError, soundfile.LibsndfileError):
            # Possibly temporary: a network drive, or another process that took the memory.
            waveform, said = _load(source, wanted, follow_links)
    if notes is not None:
        notes += said
    return waveform


def claimed_seconds(
    source: str | Path | bytes, start: float | None = None, end: float | None = None, *, follow_links: bool = True
) -> float:
    """Length of the stretch by the file's headers; 0 if they don't say or can't be read. Nothing is decoded."""
    seconds = 0.0
    try:
        with opened(source, follow_links=follow_links) as descriptor:
            for stream in find_layout(FileBytes(descriptor), end).streams:
                with closing(SndfileDecoder(descriptor, stream)) as decoder:
                    seconds += (decoder.num_frames or 0) / decoder.rate
    except (BadClipError, OSError, soundfile.SoundFileError):
        return 0.0  # decoding will name the fault
    return max(0.0, min(seconds, seconds if end is None else end) - (start or 0.0))


class DamagedError(BadClipError):
    """The format is known, but the bytes are damaged or incomplete."""


class TooLongError(BadClipError):
    """More sound than may be read, by a header's claim or while it is decoded."""


@dataclass(frozen=True)
class _Wanted:
    """The request. name: of the file, for messages. start, end, at_most_s: seconds."""

    name: str
    start: float
    end: float | None
    channel: int | None
    at_most_s: float

    @property
    def stretch(self) -> str:
        return f"from {self.start:g} s to {'its end' if self.end is None else f'{self.end:g} s'}"

    def fault(self, what: str) -> BadClipError:
        return BadClipError(f"{self.name}: {what}")


@contextmanager
def faults_named(name: str) -> Iterator[None]:
    """Any error of a decoder, also out of memory for a claimed size, counts as a fault of the file."""
    try:
        yield
    except BadClipError:
        raise
    except MemoryError as error:
        what = f"{type(error).__name__}: {error}"
        raise BadClipError(f"{name}: out of memory while it was read ({what}); give `start` and `end`") from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise BadClipError(f"{name}: unreadable audio ({what}); convert it to WAV or FLAC, or leave it out") from error


# An open decoder, and the reason why sound after its end is missing.
_Opened = tuple[Decoder, str | None]


def _load(source: str | Path | bytes, wanted: _Wanted, follow_links: bool) -> tuple[np.ndarray, list[str]]:
    with opened(source, follow_links=follow_links) as descriptor:
        data = FileBytes(descriptor)
        if data.size == 0:
            raise wanted.fault("empty, no byte in it; leave it out")
        layout = find_layout(data, wanted.end)
        try:
            return _read_mono(lambda: _sndfile_streams(descriptor, layout), wanted, layout.notes)
        except soundfile.LibsndfileError as error:
            fault = libsndfile_fault(error, descriptor, layout, wanted)
        if (program := find_ffmpeg()) is None:
            raise fault
        notes = list(layout.notes)
        try:
            return _read_mono(lambda: _ffmpeg_streams(program, descriptor, wanted.name, layout, notes), wanted, notes)
        except UnreadableError as error:
            raise (fault if isinstance(fault, DamagedError) else error) from None


def libsndfile_fault(
    error: soundfile.LibsndfileError, descriptor: int, layout: Layout, wanted: _Wanted
) -> BadClipError:
    """The error if no decoder can read the file: its format is unknown, or its sound is damaged."""
    reason = error.error_string.rstrip(".")
    try:
        ends, claimed = _stops_at(descriptor, layout)
    except soundfile.LibsndfileError:
        if lost := next((stream.lost for stream in layout.streams if stream.lost), None):
            return BadClipError(f"{wanted.name}: {lost} (libsndfile: {reason}); copy it again")
        return BadClipError(
            f"{wanted.name}: unreadable audio (libsndfile: {reason}); FFmpeg, which may read it, is not installed: "
            "install the program `ffmpeg` or `pip install imageio-ffmpeg`, or convert the file to WAV or FLAC"
        )
    claim = "without a length in its header" if claimed is None else f"and its header claims {claimed:.3f} s"
    return DamagedError(
        f"{wanted.name}: unreadable audio (libsndfile: {reason}): damaged or cut short, the sound ends at about "
        f"{ends:.1f} s, {claim}; copy it again, or set `end`"
    )


def _stops_at(descriptor: int, layout: Layout) -> tuple[float, float | None]:
    """Seconds that can be decoded, and seconds that headers claim. Raises LibsndfileError if it can't be opened."""
    seconds, claimed = 0.0, 0.0
    for decoder, _ in _sndfile_streams(descriptor, layout):
        claimed += math.inf if decoder.num_frames is None else decoder.num_frames / decoder.rate
        try:
            while len(block := decoder.read(SMALL_BLOCK)):
                seconds += len(block) / decoder.rate
        except soundfile.LibsndfileError:
            break
    return seconds, None if claimed == math.inf else claimed


def _sndfile_streams(descriptor: int, layout: Layout) -> Generator[_Opened]:
    for stream in layout.streams:
        with closing(SndfileDecoder(descriptor, stream)) as decoder:
            yield decoder, stream.lost


def _ffmpeg_streams(program: str, descriptor: int, name: str, layout: Layout, notes: list[str]) -> Generator[_Opened]:
    with closing(FfmpegDecoder(program, descriptor, name)) as decoder:
        notes[:] = [*layout.notes, *decoder.notes()]
        yield decoder, layout.streams[-1].lost


def _read_mono(
    streams: Callable[[], Generator[_Opened]], wanted: _Wanted, notes: list[str]
) -> tuple[np.ndarray, list[str]]:
    mix = _read(streams(), wanted, wanted.channel)
    if wanted.channel is None and (loudest := mix.loudest_of_cancelling()) is not None:
        mix = _read(streams(), wanted, loudest)
        notes = [*notes, f"its channels cancel each other in their mean: channel {loudest} alone is read"]
    waveform = mix.finish()
    if len(waveform) == 0:
        raise wanted.fault(f"empty {wanted.stretch}; leave it out")
    check_audible(waveform, wanted)
    return waveform, notes


def _read(streams: Generator[_Opened], wanted: _Wanted, channel: int | None) -> Mono:
    """The stretch of the streams one after the other, as one sound."""
    mono, passed = Mono(channel), Fraction(0)
    with closing(streams):
        for decoder, lost in streams:
            rate = decoder.rate
            before = round(passed * rate)
            first = max(0, round(wanted.start * rate) - before)
            last = None if wanted.end is None else round(wanted.end * rate) - before
            if last is not None and last <= 0:
                break
            check_header(decoder, wanted, mono.seconds, first, last)
            position = _read_stream(decoder, mono, wanted, first, last)
            passed += Fraction(position, rate)
            if last is None or position < last:
                check_complete(decoder, wanted, position, float(passed), lost)
    seconds = float(passed)
    if seconds == 0:
        raise wanted.fault("empty, no samples in it; leave it out")
    holds_no_sample = wanted.end is not None and wanted.end < seconds + 1 / SAMPLE_RATES[0]
    if mono.num_frames == 0 and wanted.start >= seconds and not holds_no_sample:
        raise wanted.fault(f"nothing {wanted.stretch}, the file ends at {seconds:.3f} s")
    check_end(wanted, seconds)
    return mono


def _read_stream(decoder: Decoder, mono: Mono, wanted: _Wanted, first: int, last: int | None) -> int:
    """Feed frames from `first` up to `last`, or to the decoder's end, into `mono`; return the number of frames read."""
    position = decoder.seek(first) if first and decoder.seeks else 0
    block_frames = max(1, BLOCK_SAMPLES // decoder.channels)
    while last is None or position < last:
        block = decoder.read(block_frames if last is None else min(block_frames, last - position))
        if len(block) == 0:
            break
        needed = block[max(0, first - position) :]
        position += len(block)
        if len(needed):
            check_samples(mono.add(needed, decoder.rate), wanted)
            _check_so_far(mono, wanted)
    return position


def check_header(decoder: Decoder, wanted: _Wanted, before_s: float, first: int, last: int | None) -> None:
    """Raise BadClipError, or TooLongError, if a header claims more than the limits, before anything is decoded.

    before_s: seconds read from earlier streams. first, last: frames to read of this one, None for its end.
    """
    rate, channels = decoder.rate, decoder.channels
    if wanted.channel is not None and wanted.channel >= channels:
        raise wanted.fault(f"channel {wanted.channel} was requested, but it has {channels}, numbered from 0")
    stop = last if last is not None else decoder.num_frames
    num_frames = 0 if stop is None else max(0, stop - first)
    seconds, (low, high) = before_s + num_frames / rate, SAMPLE_RATES
    limits = [
        (channels <= MAX_CHANNELS, f"{channels} channels (at most {MAX_CHANNELS})"),
        (low <= rate <= high, f"{rate} Hz ({low} to {high})"),
        (seconds <= wanted.at_most_s, f"{seconds:.5g} s to read (at most {wanted.at_most_s:.5g})"),
        (num_frames * channels <= MAX_SAMPLES, f"{num_frames * channels:.2g} samples (at most {MAX_SAMPLES:.2g})"),
    ]
    if exceeded := [claim for kept, claim in limits if not kept]:
        raise (BadClipError if seconds <= wanted.at_most_s else TooLongError)(
            f"{wanted.name}: its header claims {', '.join(exceeded)}; leave it out or, if that is true, convert it or "
            "give `start` and `end`"
        )


def _check_so_far(mono: Mono, wanted: _Wanted) -> None:
    """Apply the limits of `check_header` to headers with a wrong length or none."""
    if mono.seconds > wanted.at_most_s + MISSING_SECONDS or mono.num_samples > MAX_SAMPLES:
        raise TooLongError(
            f"{wanted.name}: it goes on after {mono.seconds:.5g} s and {mono.num_samples:.2g} samples (at most "
            f"{wanted.at_most_s:.5g} s and {MAX_SAMPLES:.2g}), whatever its header claims; give `start` and `end`"
        )


def check_samples(block: np.ndarray, wanted: _Wanted) -> None:
    """Raise BadClipError for samples that are not finite or far above full scale."""
    if not np.isfinite(block).all():
        raise wanted.fault("NaN or Inf among the samples; export it again")
    peak = float(max(block.max(initial=0.0), -block.min(initial=0.0)))
    if peak > LOUDEST_PEAK:
        raise wanted.fault(f"samples up to {peak:.1e}, where full scale is 1; export it again")


def check_complete(decoder: Decoder, wanted: _Wanted, position: int, ends: float, lost: str | None) -> None:
    """Check, after the last frame of a stream, whether its container claims more."""
    missing = 0.0 if decoder.num_frames is None else (decoder.num_frames - position) / decoder.rate
    if missing > MISSING_SECONDS:
        raise _cut_short(wanted, ends, ends + missing)
    if lost is not None:
        raise wanted.fault(f"{lost}: its sound can be read only up to {ends:.3f} s; copy it again, or set `end`")


def check_end(wanted: _Wanted, ends: float) -> None:
    """Raise BadClipError if the stretch should end after the sound. ends: seconds."""
    if wanted.end is not None and wanted.end - ends > MISSING_SECONDS:
        raise _cut_short(wanted, ends, wanted.end)


def _cut_short(wanted: _Wanted, ends: float, should_end: float) -> BadClipError:
    return wanted.fault(
        f"cut short, the sound ends at {ends:.3f} s and should go on to {should_end:.3f} s; copy it again, or correct "
        "`end`"
    )


def check_audible(waveform: np.ndarray, wanted: _Wanted) -> None:
    """Raise BadClipError if the stretch is silent."""
    peak = (float(waveform.max()) - float(waveform.min())) / 2  # a constant offset is not sound
    if peak < SILENCE_PEAK:
        raise wanted.fault(f"silent (peak {peak:.1e}) {wanted.stretch}; check the recording")
