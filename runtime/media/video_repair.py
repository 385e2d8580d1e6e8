"""Repair of a video file after a failed write: keeps the part that can be played."""

from __future__ import annotations

from pathlib import Path

from stepcell.optional_imports import require

__all__ = ["repair_video"]

_MATROSKA = ".mkv"  # readable up to where it was cut, so nothing has to be truncated


def repair_video(path: Path) -> int:
    """Truncate a video file after its last complete fragment; a complete file is not changed.

    Returns:
        The number of frames, counted by reading the file once.

    Raises:
        OSError, av.FFmpegError: no part of the file can be read.
    """
    av = require("av", extra="video", purpose="writing video")
    if path.suffix.lower() != _MATROSKA:
        with path.open("rb+") as file:
            file.truncate(_end_of_fragments(path))
    with av.open(f"file:{path}") as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def _end_of_fragments(path: Path) -> int:
    """Length of a complete MP4 or QuickTime file; offset after the last complete fragment of one that was cut off.

    The file is a sequence of boxes (size, type, contents), ISO/IEC 14496-12, 4.2. A fragment is a `moof` box, the
    index, followed by an `mdat` box, the frames.
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
