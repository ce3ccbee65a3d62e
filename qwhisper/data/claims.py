"""Whether W64, CAF, VOC and NIST Sphere files have all the bytes of sound that their headers claim.

libsndfile and FFmpeg read such a cut file as a short one. For RIFF, AIFF, AU and others see `containers`.
"""

import struct

from qwhisper.data.files import FileBytes

_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_W64_HEAD = 24  # bytes of a chunk's name and size, which the size includes
_VOC = b"Creative Voice File\x1a"
_NIST = b"NIST_1A\n"
_FEW_BYTES = 800  # 0.1 s of telephone sound


def missing_bytes(data: FileBytes, start: int) -> str | None:
    """A message such as "cut short, its header claims …", or None if nothing is missing.

    Also None for a format that isn't known here, or an unknown length (the file was written to a pipe).
    """
    magic = data.get(start, 20)
    for begins, sound in ((_W64, _w64_sound), (b"caff", _caf_sound), (_VOC, _voc_sound), (_NIST, _nist_sound)):
        if magic.startswith(begins):
            at, claimed = sound(data, start)
            there = data.size - at
            return short_of(claimed, there) if there + _FEW_BYTES < claimed < 2**62 else None
    return None


def short_of(claimed: int, there: int) -> str:
    return f"cut short, its header claims {claimed} bytes of sound, {there} are there"


# Each of these returns (start of the sound, its bytes by the header), or (0, 0) if the header does not say.


def _w64_sound(data: FileBytes, start: int) -> tuple[int, int]:
    at = start + 40
    while len(head := data.get(at, _W64_HEAD)) == _W64_HEAD:
        size = struct.unpack("<Q", head[16:])[0]
        if head[:4] == b"data":
            return at + _W64_HEAD, size - _W64_HEAD
        at += max(_W64_HEAD, size + -size % 8)
    return 0, 0


def _caf_sound(data: FileBytes, start: int) -> tuple[int, int]:
    at = start + 8
    while len(head := data.get(at, 12)) == 12:
        size = struct.unpack(">q", head[4:])[0]
        if head[:4] == b"data":
            return at + 12, size  # -1: up to the end of the file
        at += 12 + max(0, size)
    return 0, 0


def _voc_sound(data: FileBytes, start: int) -> tuple[int, int]:
    """To the end of the last block, by the sizes of the blocks: the format has no other length."""
    at = first = start + int.from_bytes(data.get(start + 20, 2), "little")
    while len(head := data.get(at, 4)) == 4 and head[0] != 0:
        at += 4 + int.from_bytes(head[1:], "little")
    return first, at - first


def _nist_sound(data: FileBytes, start: int) -> tuple[int, int]:
    header = data.get(start, 1024).decode("latin-1")
    lines = [line.split() for line in header.partition("end_head")[0].splitlines()]
    said = {line[0]: line[2] for line in lines if len(line) == 3}
    sizes = [said.get(name, "") for name in ("sample_count", "sample_n_bytes", "channel_count")]
    length = lines[1][0] if len(lines) > 1 and lines[1] else ""
    if "shorten" in said.get("sample_coding", "") or not all(text.isdecimal() for text in (*sizes, length)):
        return 0, 0
    count, width, channels = map(int, sizes)
    return start + int(length), count * width * channels
