"""What is left of a video file whose writing broke off."""

from __future__ import annotations

from pathlib import Path

from stepcell.missing import require

__all__ = ["keep_whole"]

MATROSKA = ".mkv"  # is read up to where it breaks off, as it is


def keep_whole(path: Path) -> int:
    """Cut off a piece that is not whole; the number of frames in the file, which is read once for it.

    Raises:
        OSError, av.FFmpegError: nothing of it can be read.
    """
    av = require("av", extra="video", purpose="writing video")
    if path.suffix != MATROSKA:
        with path.open("rb+") as file:
            file.truncate(_end_of_pieces(path))
    with av.open(f"file:{path}") as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def _end_of_pieces(path: Path) -> int:
    """Where an MP4 or QuickTime file ends, or the last whole piece of it where it breaks off.

    Its boxes are (size, type, contents) one behind the other, ISO/IEC 14496-12, 4.2; a piece is a `moof`, its index,
    and an `mdat`, its frames.
    """
    length, position, end = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while len(head := file.read(16)) >= 8:
            size = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
            position += size
            if size < 8 or position > length:
                return end
            if head[4:8] == b"mdat":
                end = position
            file.seek(position)
    return length if position == length else end
