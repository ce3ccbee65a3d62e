"""Finds the streams of sound in a file by its structure: RIFF, AIFF, AU, Ogg, FLAC and MPEG audio.

libsndfile believes the first length in a header. A file that was written to a pipe has no length there, or an invented
one; joined files hold several streams. The streams found here go to the decoder one by one, with their true length.
Other formats go to the decoder unchanged.
"""

import struct
from dataclasses import dataclass, field
from fractions import Fraction

from qwhisper.data.claims import missing_bytes, short_of
from qwhisper.data.files import FileBytes, Piece
from qwhisper.data.mpeg import MpegLayout, MpegStream, mpeg_layout, skip_id3

# A writer to a pipe can't know the length. These claims (bytes) mean "unknown" if fewer bytes are there: 0, about
# 2^31 and 2^32 (less the headers), SoX's AIFF, and two billion. Any other claim that isn't met means a cut file.
_UNKNOWN = [(2_000_000_000, 2_000_065_536), (0x7F000000, 0x7F010000), (0x7FFF0000, 0x80010000), (0xFFFF0000, 2**63)]
_MPEG_IN_WAV = (0x50, 0x55)  # format tags
_SOUND = {"<": b"data", ">": b"SSND"}  # the chunk of sound in RIFF and in AIFF
_MAX_RIFF = 2**32 - 2**16
_LONG_S = 0.1  # up to this, missing or surplus bytes may be padding
_FEW_BYTES = 800  # 0.1 s of telephone sound


@dataclass
class Stream:
    """Sound that one decoder can read: `pieces` of the file, None for the whole file.

    seeks: a seek reaches the same sample as a full decode. lost: why sound after its end is missing, or None.
    num_frames: number of frames, if the container has it and the decoder might not. skip: frames that the decoder gives
    before the first.
    """

    pieces: list[Piece] | None = None
    seeks: bool = True
    lost: str | None = None
    num_frames: int | None = None
    skip: int = 0


@dataclass
class Layout:
    """A file's streams in order, and notes on the file."""

    streams: list[Stream] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_layout(data: FileBytes, end: float | None = None) -> Layout:
    """The streams of a file. end: seconds needed; streams after that may be left out."""
    start = skip_id3(data, 0, data.size)
    magic = data.get(start, 12)
    if magic[:4] in (b"RIFF", b"RIFX", b"RF64") and magic[8:12] == b"WAVE":
        return _riff_layout(data, start)
    if magic[:4] == b"RIFF":  # AVI and others, which FFmpeg reads
        size = struct.unpack("<I", magic[4:8])[0]
        cut = start + 8 + size > data.size and not is_unknown(size)
        return Layout(
            [Stream(lost=f"cut short, its header claims {size} bytes, {data.size} are there" if cut else None)]
        )
    if magic[:4] == b"FORM" and magic[8:12] in (b"AIFF", b"AIFC"):
        return Layout([_aiff_stream(data, start)])
    if magic[:4] == b".snd":
        return Layout([_au_stream(data, start)])
    if magic[:4] == b"OggS":
        return _ogg_layout(data)
    if magic[:4] == b"fLaC":
        return _flac_layout(data, start, end)
    found = mpeg_layout(data, 0, data.size)
    if found is not None and found.streams:
        return _of_mpeg(found)
    return Layout([Stream(lost=missing_bytes(data, start))])


def is_unknown(claimed: int) -> bool:
    """Whether a claim of missing bytes means an unknown length."""
    return claimed == 0 or any(low <= claimed <= high for low, high in _UNKNOWN)


def _of_mpeg(found: MpegLayout) -> Layout:
    layout = Layout()
    for part in found.streams:
        pieces, skip = part.with_count()
        # An encoder's header holds the delay that a decoder skips; without a header, every sample counts.
        num_frames = part.num_frames * part.frame.samples if part.claimed_frames is None else None
        layout.streams.append(Stream(pieces, False, _missing_in_mpeg(part), num_frames, skip))
    if found.skipped:
        layout.notes.append(f"skipped {found.skipped} bytes that are neither MPEG frames nor tags")
    return layout


def _missing_in_mpeg(part: MpegStream) -> str | None:
    claimed, seconds = part.claimed_frames, part.frame.samples / part.frame.kind[2]
    if claimed is not None and (claimed - part.num_frames) * seconds > _LONG_S:
        return (
            f"cut short, its header claims {claimed} frames ({claimed * seconds:.3f} s) and {part.num_frames} "
            f"({part.num_frames * seconds:.3f} s) are there"
        )
    if part.missing and (claimed is None or claimed > part.num_frames):
        return f"cut short, its last frame lacks {part.missing} of {part.frame.length} bytes"
    return None


@dataclass
class _Chunk:
    name: bytes
    start: int  # of its content
    size: int  # as claimed


def chunks(data: FileBytes, start: int, order: str):
    """The chunks from `start` on, as long as the bytes look like chunks that fit into the file."""
    while start + 8 <= data.size:
        head = data.get(start, 8)
        name, size = head[:4], struct.unpack(f"{order}I", head[4:])[0]
        if not all(0x20 <= byte < 0x7F for byte in name):
            return
        yield _Chunk(name, start + 8, size)
        start += 8 + size + size % 2


def _riff_layout(data: FileBytes, start: int | None) -> Layout:
    """RIFF files end to end: usually one."""
    layout = Layout()
    while start is not None:
        stream, start = _riff_stream(data, start, layout)
        if stream is not None:
            layout.streams.append(stream)
    return layout


def _riff_stream(data: FileBytes, start: int, layout: Layout) -> tuple[Stream | None, int | None]:
    """The stream of the RIFF file at `start` (None if `layout` already has it), and the start of the next file."""
    magic = data.get(start, 4)
    order, size_64, form = (">" if magic == b"RIFX" else "<"), None, (0, 0)
    for chunk in chunks(data, start + 12, order):
        content = data.get(chunk.start, 16).ljust(16, b"\0")
        if chunk.name == b"ds64":
            size_64 = struct.unpack("<Q", content[8:])[0]
        elif chunk.name == b"fmt ":
            form = struct.unpack(f"{order}H6xI", content[:12])
        elif chunk.name == b"data":
            break
    else:
        return Stream(), None
    tag, bytes_per_second = form
    claimed = size_64 if size_64 is not None and chunk.size == 0xFFFFFFFF else chunk.size
    there = data.size - chunk.start
    following, lost, rewritten = None, None, False
    if claimed == 0 and _is_chunk_list(data, chunk.start, order):  # no sound
        stop = chunk.start
    elif is_unknown(claimed) and (claimed == 0 or claimed > there):  # written to a pipe
        following, rewritten = _next_riff(data, chunk.start), True
        stop = data.size if following is None else following
        if stop - start >= _MAX_RIFF:
            stop, lost = start + _MAX_RIFF, f"{there} bytes of sound are there, more than a RIFF header can claim"
    elif claimed > there:  # cut short; a few bytes may be padding
        stop = data.size
        if claimed - there > max(_FEW_BYTES, bytes_per_second // 10):
            lost = short_of(claimed, there)
    else:
        stop = chunk.start + claimed
        following, lost = _behind_data(data, stop + claimed % 2, order, claimed, bytes_per_second // 10)
    if tag in _MPEG_IN_WAV and (found := mpeg_layout(data, chunk.start, stop)) is not None and found.streams:
        part = _of_mpeg(found)
        part.streams[-1].lost = part.streams[-1].lost or lost
        layout.streams += part.streams
        layout.notes += part.notes
        return None, following
    if rewritten:
        return Stream(_rewritten(start, chunk, stop, order), lost=lost), following
    if lost is not None and claimed <= there:  # libsndfile refuses what follows in some files
        return Stream([(start, stop)], lost=lost), following
    whole = start == 0 and following is None
    return Stream(None if whole else [(start, data.size if following is None else following)], lost=lost), following


def _rewritten(start: int, chunk: _Chunk, stop: int, order: str) -> list[Piece]:
    """A RIFF file with the sizes of the sound from `chunk.start` to `stop`, which ends with its sound."""
    sizes = [struct.pack(f"{order}I", size) for size in (stop - start - 8, stop - chunk.start)]
    magic = {">": b"RIFX", "<": b"RIFF"}[order]
    return [magic + sizes[0], (start + 8, chunk.start - 4), sizes[1], (chunk.start, stop)]


def _is_chunk_list(data: FileBytes, start: int, order: str) -> bool:
    """Whether the rest of a file is chunks to its end, or nothing."""
    for chunk in chunks(data, start, order):
        start = chunk.start + chunk.size + chunk.size % 2
    return start >= data.size


def _behind_data(data: FileBytes, at: int, order: str, claimed: int, allowed: int) -> tuple[int | None, str | None]:
    """Start of the next RIFF file after the sound, and what is wrong with the bytes there."""
    for chunk in chunks(data, at, order):
        if chunk.name in (b"RIFF", b"RIFX", b"RF64") and data.get(chunk.start, 4) == b"WAVE":
            return chunk.start - 8, None
        if chunk.name == _SOUND[order]:
            return None, f"a second chunk of sound, of {chunk.size} bytes, follows the first"
        if chunk.start + chunk.size > data.size:
            break
        at = chunk.start + chunk.size + chunk.size % 2
    return None, _left_over(data, at, claimed, allowed)


def _left_over(data: FileBytes, at: int, claimed: int, allowed: int) -> str | None:
    """Message about bytes after the claimed sound, if they are more than `allowed` and no tag."""
    at = skip_id3(data, at, data.size)
    rest = data.size - at
    if rest <= max(allowed, 128) or data.only_zeros(at, data.size):
        return None
    return f"its header claims {claimed} bytes of sound, but {rest} more follow that are no chunk"


def _next_riff(data: FileBytes, start: int) -> int | None:
    at = data.find(b"WAVEfmt ", start, data.size)
    return at - 8 if at >= start + 8 and data.get(at - 8, 4) in (b"RIFF", b"RIFX", b"RF64") else None


def _aiff_stream(data: FileBytes, start: int) -> Stream:
    for chunk in chunks(data, start + 12, ">"):
        stop = chunk.start + chunk.size
        if chunk.name == b"SSND" and chunk.size > 8 and stop < data.size:
            return Stream(lost=_behind_data(data, stop + chunk.size % 2, ">", chunk.size, _FEW_BYTES)[1])
    return Stream()


def _au_stream(data: FileBytes, start: int) -> Stream:
    offset, claimed = struct.unpack(">II", data.get(start + 4, 8).ljust(8, b"\0"))
    behind = start + offset + claimed
    known = claimed != 0xFFFFFFFF and behind < data.size
    return Stream(lost=_left_over(data, behind, claimed, _FEW_BYTES) if known else None)


@dataclass
class _OggLink:
    """One of the chained streams, and for each of its logical streams the end of its last page."""

    start: int
    stop: int = 0
    ended: dict[bytes, bool] = field(default_factory=dict)
    continued: bool = False  # its last page ends within a packet


def _ogg_layout(data: FileBytes) -> Layout:
    links, skipped, cut = _ogg_links(data)
    layout = Layout()
    for link in links:
        whole = len(links) == 1 and not skipped
        stream = Stream(None if whole else [(link.start, link.stop)])
        if link is links[-1] and cut:
            stream.lost = f"cut short, its last page lacks {cut} bytes"
        elif link.continued and not all(link.ended.values()):
            stream.lost = "cut short, its last page ends within a packet"
        elif not all(link.ended.values()):
            layout.notes.append("its Ogg stream has no end mark: perhaps its recorder was stopped")
        layout.streams.append(stream)
    if skipped:
        layout.notes.append(f"skipped {skipped} bytes that are no Ogg page")
    return layout


def _ogg_links(data: FileBytes) -> tuple[list[_OggLink], int, int]:
    """The chained streams; bytes that belong to no page (zeros don't count); bytes that the last page lacks."""
    links: list[_OggLink] = []
    position, skipped, in_headers = 0, 0, False
    while position < data.size:
        head = data.get(position, 27)
        if head[:4] != b"OggS"[: len(head)]:
            behind = data.find(b"OggS", position + 1, data.size)
            behind = data.size if behind < 0 else behind
            skipped += 0 if data.only_zeros(position, behind) else behind - position
            position = behind
            continue
        if len(head) < 27:
            return links, skipped, 27 - len(head)
        lacing = data.get(position + 27, head[26])
        end = position + 27 + head[26] + sum(lacing)
        if end > data.size or len(lacing) < head[26]:
            return links, skipped, max(end - data.size, 1)
        begins, serial = bool(head[5] & 2), head[14:18]
        if not links or (begins and not in_headers):
            links.append(_OggLink(position))
        in_headers = begins
        links[-1].stop = position = end
        links[-1].ended[serial] = bool(head[5] & 4)
        links[-1].continued = lacing[-1:] == b"\xff"
    return links, skipped, 0


_FLAC_BEGINNINGS = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")


def _flac_layout(data: FileBytes, start: int, end: float | None) -> Layout:
    """FLAC files end to end: usually one. If `end` is within the first, the rest is not searched."""
    rate, num_frames = _flac_claim(data, start)
    if end is not None and rate and Fraction(end) * rate <= num_frames:
        return Layout([Stream()])
    layout = Layout()
    while True:
        sound = behind_flac_metadata(data, start)
        found = [at for what in _FLAC_BEGINNINGS if (at := data.find(what, sound, data.size)) >= 0]
        stop = min(found, default=data.size)
        if not found and data.get(max(sound, stop - 128), 3) == b"TAG":
            stop -= 128
        num_frames = _flac_claim(data, start)[1]
        # With an unknown length in the header, libFLAC decodes to the end.
        unknown = bytes((data.get(start + 21, 1)[0] & 0xF0, 0, 0, 0, 0))
        pieces: list[Piece] = [(start, start + 21), unknown, (start + 26, stop)]
        layout.streams.append(Stream(pieces, False, num_frames=num_frames or None))
        if not found:
            return layout
        start = stop


def _flac_claim(data: FileBytes, start: int) -> tuple[int, int]:
    """Sample rate and number of frames in a FLAC header; 0 frames means unknown."""
    info = int.from_bytes(data.get(start + 18, 8).ljust(8, b"\0"), "big")
    return info >> 44, info & (1 << 36) - 1


def behind_flac_metadata(data: FileBytes, start: int) -> int:
    """Start of the sound, after the metadata, which may hold anything (a picture, another file)."""
    at = start + 4
    while at + 4 <= data.size:
        head = data.get(at, 4)
        at += 4 + int.from_bytes(head[1:], "big")
        if head[0] & 0x80:
            break
    return min(at, data.size)
