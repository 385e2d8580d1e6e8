"""Orientation: how a stored picture is turned and mirrored before it is shown.

A video has a display matrix, a 3x3 matrix that maps stored to shown positions (ISO/IEC 14496-12, 8.3.2; the same in
Matroska and in the SEI of H.264). A still picture has the tag Orientation of EXIF (EXIF 3.0, 4.6.5.1), 1 to 8.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

__all__ = ["UPRIGHT", "Orientation", "frame_orientation"]

_ORIENTATION = 0x0112  # tag of EXIF and TIFF
_HEADER = 1 << 20  # bytes in which the EXIF block of a picture is searched for


@dataclass(frozen=True)
class Orientation:
    """One of the eight orientations.

    Attributes:
        transpose: rows become columns; before the flips.
        flip_rows: upside down.
        flip_columns: left to right.
    """

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def of_matrix(cls, a: int, b: int, c: int, d: int) -> Orientation:
        """From a display matrix that shows the position (x, y) at (a x + c y, b x + d y).

        An angle between quarter turns is rounded to the nearest.
        """
        transpose = abs(b) + abs(c) > abs(a) + abs(d)
        x, y = (c, b) if transpose else (a, d)
        return cls(transpose, flip_rows=y < 0, flip_columns=x < 0)

    @classmethod
    def of_exif(cls, tag: int) -> Orientation:
        """From the tag of EXIF: 1 upright, 2 mirrored, 3 half a turn, 6 a quarter turn clockwise, ..."""
        return _OF_EXIF.get(tag, UPRIGHT)

    def __call__(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """The picture (H, W, ...) as it is shown: a view."""
        shown = pixels.swapaxes(0, 1) if self.transpose else pixels
        return shown[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


UPRIGHT = Orientation()
_OF_EXIF = {
    2: Orientation(flip_columns=True),
    3: Orientation(flip_rows=True, flip_columns=True),
    4: Orientation(flip_rows=True),
    5: Orientation(transpose=True),
    6: Orientation(transpose=True, flip_columns=True),
    7: Orientation(transpose=True, flip_rows=True, flip_columns=True),
    8: Orientation(transpose=True, flip_rows=True),
}


def frame_orientation(frame: Any, path: Path | None) -> Orientation:
    """Orientation of a decoded frame.

    Args:
        frame: `av.VideoFrame`.
        path: the file it is from; None: a camera or a URL.
    """
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV before 19 fails on the EXIF block of a picture (findings/pyav-exif-side-data.sh)
        return Orientation.of_exif(_exif_orientation(path)) if path is not None else UPRIGHT
    if data is None:
        return UPRIGHT
    a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
    return Orientation.of_matrix(a, b, c, d)


def _exif_orientation(path: Path) -> int:
    """Tag Orientation of a JPEG, PNG, WebP or TIFF file; 1 if it has none."""
    try:
        with path.open("rb") as file:
            data = file.read(_HEADER)
            return _tiff_orientation(_exif_block(data))
    except (OSError, struct.error, ValueError):  # cut off or malformed
        return 1


def _exif_block(data: bytes) -> bytes:
    """The EXIF block of a picture, which is a TIFF file in itself; empty if there is none."""
    if data[:2] in (b"II", b"MM"):
        return data
    if data[:2] == b"\xff\xd8":  # JPEG: segments of marker and length
        at = 2
        while data[at : at + 1] == b"\xff" and data[at + 1] != 0xDA:
            (length,) = struct.unpack_from(">H", data, at + 2)
            if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                return data[at + 10 : at + 2 + length]
            at += 2 + length
        return b""
    png = data[:4] == b"\x89PNG"  # chunks of length, name, data and checksum
    at = 8 if png else 12  # RIFF, as in WebP: chunks of name, length and data of even length
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I" if png else "<I", data, at if png else at + 4)
        if data[at + 4 if png else at :][:4] in (b"eXIf", b"EXIF"):
            return data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0")
        at += 8 + length + (4 if png else length % 2)
    return b""


def _tiff_orientation(data: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return 1
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        if struct.unpack_from(order + "H", data, entry) == (_ORIENTATION,):
            return int(struct.unpack_from(order + "H", data, entry + 8)[0])
    return 1
