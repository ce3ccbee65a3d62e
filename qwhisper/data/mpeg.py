"""MP3 (and MP1, MP2) frame by frame: counts the frames, and finds where a stream begins and ends.

libsndfile believes the frame count of a Xing or Info header and, without one, guesses it from the first frame's bit
rate. It stops there, even if a second file follows. So the frames are counted here, and a header with that count is put
in front of each stream.
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache

from qwhisper.data.files import BLOCK, FileBytes, Piece

# kbit/s by bit-rate index 1 to 14: (MPEG 1?, layer).
_BIT_RATES = {
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44_100, 48_000, 32_000)
DECODER_DELAY = 529  # samples
_ID3_END = 128  # bytes of an ID3v1 tag, at the end of a file
_BEGINNING = re.compile(rb"\xff[\xe0-\xff]|ID3|TAG|APETAGEX")


@dataclass(frozen=True)
class Frame:
    """A frame's header. `kind`: what is constant within a stream: version, layer, rate, mono or not."""

    length: int
    samples: int
    kind: tuple[int, int, int, bool]
    info_at: int  # offset of a Xing or Info header in the frame


@dataclass
class MpegStream:
    """Frames of one kind. `info`: the header frame with the encoder's count, or None."""

    frame: Frame
    pieces: list[tuple[int, int]]
    header: bytes
    info: bytes | None = None
    num_frames: int = 0
    missing: int = 0  # bytes that its last frame lacks

    @property
    def claimed_frames(self) -> int | None:
        """The encoder's own count, or None."""
        if self.info is None or not self.info[self.frame.info_at + 7] & 1:
            return None
        return int.from_bytes(self._count_of(self.info), "big")

    def with_count(self) -> tuple[list[Piece], int]:
        """The stream's bytes for a decoder, with a header that has the number of frames; and the number of samples
        before the first.
        """
        if self.frame.kind[1] != 3:
            return list(self.pieces), 0
        claimed = self.claimed_frames
        if self.info is None or claimed is None:
            # mpg123 skips the decoder's delay if there is a header; it then skips a silent frame instead.
            header = self._made_frame()
            counted = self._counted(
                header[: self.frame.info_at] + b"Info\0\0\0\1" + header[self.frame.info_at + 8 :], 1
            )
            return [counted + header, *self.pieces], self.frame.samples - DECODER_DELAY
        return [self.info if claimed >= self.num_frames else self._counted(self.info, 0), *self.pieces], 0

    def _count_of(self, info: bytes) -> bytes:
        return info[self.frame.info_at + 8 : self.frame.info_at + 12]

    def _counted(self, info: bytes, more: int) -> bytes:
        at = self.frame.info_at + 8
        return info[:at] + (self.num_frames + more).to_bytes(4, "big") + info[at + 4 :]

    def _made_frame(self) -> bytes:
        """A silent frame of this kind, without CRC and padding, at a bit rate with space for a header."""
        header = bytes((self.header[0], self.header[1] | 1, 0x80 | self.header[2] & 0x0C, self.header[3]))
        frame = read_frame(header)
        assert frame is not None
        return header.ljust(frame.length, b"\0")


@dataclass
class MpegLayout:
    """The streams of MPEG audio in a file, in order."""

    streams: list[MpegStream] = field(default_factory=list)
    skipped: int = 0  # bytes that are neither frames nor tags


@lru_cache(maxsize=4096)
def read_frame(header: bytes) -> Frame | None:
    """The header in these 4 bytes; None if they are no header, or have a free bit rate, which would need a search."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)  # version 3 is MPEG 1, 2 is MPEG 2, 0 is MPEG 2.5
    bit_rate, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 4 or bit_rate in (0, 15) or rate == 3 or header[3] & 3 == 2:
        return None
    first, hertz = version == 3, _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits = _BIT_RATES[first, layer][bit_rate - 1] * 1000
    padding = header[2] >> 1 & 1
    samples = 384 if layer == 1 else 576 if layer == 3 and not first else 1152
    length = (12 * bits // hertz + padding) * 4 if layer == 1 else samples // 8 * bits // hertz + padding
    mono = header[3] >> 6 == 3
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return Frame(length, samples, (version, layer, hertz, mono), 4 + side)


def skip_id3(data: FileBytes, start: int, stop: int) -> int:
    """End of the ID3v2 tags at `start`."""
    while start + 10 <= stop and (head := data.get(start, 10))[:3] == b"ID3" and max(head[6:10]) < 128:
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        start += 10 + size + (10 if head[5] & 0x10 else 0)
    return start


def mpeg_layout(data: FileBytes, start: int, stop: int) -> MpegLayout | None:
    """The streams between two offsets; None if there is no frame at `start` after its tags."""
    layout, stream = MpegLayout(), None
    position, certain = skip_id3(data, start, stop), False
    if not _begins(data, position, stop):
        return None
    while position < stop:
        frame = read_frame(data.get(position, 4))
        if frame is None or not (certain or _begins(data, position, stop)):
            behind = _skip_tag(data, position, stop)
            if behind == position:
                behind = _next_frame(data, position, stop)
                if not data.only_zeros(position, behind):
                    layout.skipped += behind - position
            position, certain = behind, False
            continue
        end = position + frame.length
        if end > stop:
            if stream is not None:
                stream.missing = end - stop
            break
        info = _info_frame(data, position, frame)
        if stream is None or info is not None or frame.kind != stream.frame.kind:
            stream = MpegStream(frame, [], data.get(position, 4), info)
            layout.streams.append(stream)
        if info is None:
            stream.num_frames += 1
            if stream.pieces and stream.pieces[-1][1] == position:
                stream.pieces[-1] = (stream.pieces[-1][0], end)
            else:
                stream.pieces.append((position, end))
        position, certain = end, True
    layout.streams = [stream for stream in layout.streams if stream.num_frames]
    return layout


def _begins(data: FileBytes, position: int, stop: int) -> bool:
    """A frame followed by another of its kind, a tag or the end: four bytes alone look like a header too often."""
    frame = read_frame(data.get(position, 4))
    if frame is None:
        return False
    end = position + frame.length
    following = read_frame(data.get(end, 4)) if end + 4 <= stop else None
    if following is not None:
        return following.kind[:3] == frame.kind[:3]
    return end >= stop or _skip_tag(data, end, stop) > end


def _info_frame(data: FileBytes, position: int, frame: Frame) -> bytes | None:
    if frame.kind[1] != 3 or frame.length < frame.info_at + 12:
        return None
    if data.get(position + frame.info_at, 4) not in (b"Xing", b"Info"):
        return None
    return data.get(position, frame.length)


def _skip_tag(data: FileBytes, position: int, stop: int) -> int:
    """End of a tag at `position`; `position` itself if there is none."""
    head = data.get(position, 32)
    if head[:3] == b"ID3":
        return min(skip_id3(data, position, stop), stop)
    if head[:3] == b"TAG" and position + _ID3_END <= stop:
        return position + _ID3_END
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return min(position + 32 + (int.from_bytes(head[12:16], "little") if head[23] & 0x20 else 0), stop)
    return position


def _next_frame(data: FileBytes, position: int, stop: int) -> int:
    """Start of the next frame or tag; `stop` if there is none."""
    at = position + 1
    while at < stop:
        block = data.get(at, min(BLOCK, stop - at))
        for match in _BEGINNING.finditer(block):
            found = at + match.start()
            if _begins(data, found, stop) or _skip_tag(data, found, stop) > found:
                return found
        if len(block) < BLOCK:
            break
        at += len(block) - 7  # the longest prefix that the end of a block may cut
    return stop
