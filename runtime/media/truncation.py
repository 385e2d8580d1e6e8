"""Truncation: whether a video file is shorter than its container says.

FFmpeg ends some formats without an error where the file was cut off.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

__all__ = ["missing_bytes"]

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # RFC 8794, 11.2.1; RFC 9559, 5.1
_FIRST_BOXES = (b"ftyp", b"styp", b"sidx", b"wide", b"skip", b"free")
_NEEDED_BOXES = (b"moov", b"moof", b"mdat")  # indices and frames

# MPEG-TS is a sequence of packets (ISO/IEC 13818-1, 2.4.3), in .m2ts with a time stamp of 4 bytes before each.
_PACKET, _TIMED_PACKET, _SYNC = 188, 192, b"\x47"


def missing_bytes(path: Path) -> int | None:
    """Bytes that a Matroska, MP4, QuickTime, AVI or MPEG-TS file declares beyond its end.

    0: it is as long as it says, or ends with a whole packet of MPEG-TS. None: the format does not say, or the file
    cannot be read.
    """
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            declared = _declared_length(file, length)
    except OSError:
        return None
    return None if declared is None else max(0, declared - length)


def _declared_length(file: BinaryIO, length: int) -> int | None:
    head = file.read(_TIMED_PACKET + 5)
    for packet, at in ((_PACKET, 0), (_TIMED_PACKET, 4)):
        if head[at::packet][:2] == _SYNC * 2:
            return -(-length // packet) * packet
    file.seek(0)
    if head[:4] == _EBML:
        return _matroska_length(file)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return _riff_length(file)
    return _boxes_length(file) if head[4:8] in (*_FIRST_BOXES, *_NEEDED_BOXES) else None


def _matroska_length(file: BinaryIO) -> int | None:
    """Position after the segment; None: written live, of unknown size."""
    while element := _element(file):
        name, size = element
        if size is None:
            return None
        if name == _SEGMENT:
            return file.tell() + size
        file.seek(size, os.SEEK_CUR)
    return None


def _element(file: BinaryIO) -> tuple[bytes, int | None] | None:
    """Name and size of the EBML element that begins here; the size is None where it is unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    name = first + file.read(8 - first[0].bit_length())
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> more)]) + file.read(more), "big")
    return name, None if value == (1 << 7 * (more + 1)) - 1 else value


def _boxes_length(file: BinaryIO) -> int:
    """Position after the last box of frames or of their index (ISO/IEC 14496-12, 4.2)."""
    position = end = 0
    while len(head := file.read(16)) >= 8:
        size = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
        if size < 8:  # 0: to the end of the file
            break
        position += size
        if head[4:8] in _NEEDED_BOXES:
            end = position
        file.seek(position)
    return end


def _riff_length(file: BinaryIO) -> int | None:
    """Position after the last RIFF list: an .avi above 1 GiB has several. None: sizes were not filled in."""
    position = 0
    while len(head := file.read(12)) == 12 and head[:4] == b"RIFF":
        size = int.from_bytes(head[4:8], "little")
        if size in (0, 0xFFFFFFFF):
            return None
        position += 8 + size + size % 2
        file.seek(position)
    return position
