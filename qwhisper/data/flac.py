"""Checks whether a FLAC file ends where its header says, by the sample counts in the header and in the last frame.

A frame of FLAC is a block of samples of all channels (RFC 9639); each begins with a header that has a checksum.
"""

from qwhisper.data.containers import behind_flac_metadata
from qwhisper.data.files import FileBytes

_STREAMINFO = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")  # how a file begins
_UNKNOWN_FRAME_BYTES = 2**17  # searched for the last frame if the header doesn't give the largest
_TAGS = 256  # bytes that may follow the last frame
_HEADER = 16  # bytes, at most


def counted_samples(data: FileBytes) -> tuple[int, int] | None:
    """(samples of each channel, rate) if the file's last frame ends with the last sample that its header claims; None
    otherwise.
    """
    if data.get(0, 8) not in _STREAMINFO:
        return None
    info = data.get(8, 18)
    largest_block, largest_frame = int.from_bytes(info[2:4], "big"), int.from_bytes(info[7:10], "big")
    claim = int.from_bytes(info[10:18], "big")
    rate, claimed = claim >> 44, claim & (1 << 36) - 1
    if not rate or not claimed:
        return None
    tail = min(data.size, (largest_frame or _UNKNOWN_FRAME_BYTES) + _TAGS)
    ending, first = data.get(data.size - tail, tail), data.get(behind_flac_metadata(data, 0), _HEADER)
    at = len(ending)
    while len(first) > 1 and (at := ending.rfind(first[:2], 0, at)) >= 0:
        head = ending[at : at + _HEADER]
        if _format_of(head) == _format_of(first) and (end := _end_of_frame(head, largest_block)) is not None:
            return (claimed, rate) if end == claimed else None
    return None


def _format_of(head: bytes) -> tuple[int, ...]:
    """The fields that are equal in the headers of all frames of a file: sample rate and sample size."""
    return tuple(byte & 15 for byte in head[2:4])


def _end_of_frame(head: bytes, largest_block: int) -> int | None:
    """The number of samples up to the end of this frame; None if no frame's header begins here."""
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xFE != 0xF8:
        return None
    block_code, rate_code, number_bytes = head[2] >> 4, head[2] & 15, _leading_ones(head[4])
    number_bytes = number_bytes or 1
    block_bytes = {6: 1, 7: 2}.get(block_code, 0)
    block_at = 4 + number_bytes
    length = block_at + block_bytes + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if block_code == 0 or rate_code == 15 or number_bytes == 8 or length >= len(head) or _crc8(head[: length + 1]):
        return None
    number = head[4] & (0xFF >> number_bytes if number_bytes > 1 else 0x7F)
    for byte in head[5:block_at]:
        number = number << 6 | byte & 0x3F
    if block_bytes:
        block = 1 + int.from_bytes(head[block_at : block_at + block_bytes], "big")
    else:
        block = 192 if block_code == 1 else 576 << block_code - 2 if block_code < 6 else 256 << block_code - 8
    # Frames of one size are numbered, those of various sizes have the number of their first sample.
    return block + (number if head[1] & 1 else number * largest_block)


def _leading_ones(byte: int) -> int:
    return 8 - (byte ^ 0xFF).bit_length()


def _crc8(content: bytes) -> int:
    """0 if the last byte is the checksum of those before it."""
    crc = 0
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 ^ (0x107 if crc & 0x80 else 0)
    return crc
