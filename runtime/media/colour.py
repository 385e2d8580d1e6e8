"""Colour of video: which matrix, primaries and transfer function a frame has, and its conversion to RGB.

The numbers are those of ISO/IEC 23091-2 (ITU-T H.273), which FFmpeg and the files use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepcell.nv12 import CodedRange

__all__ = ["BT709", "Colour", "coded_range", "matrix_name", "matrix_of", "states_matrix"]

BT709 = 1  # the same number for matrix, primaries and transfer function
_RGB, _BT2020, _PQ, _HLG = 0, 9, 16, 18
_TRANSFERS = {_PQ: "PQ", _HLG: "HLG"}
# Matrices that swscale, which converts the frames, computes: BT.709, FCC, BT.601 (two numbers), SMPTE 240M, BT.2020.
_KNOWN_MATRICES = (_RGB, BT709, 4, 5, 6, 7, _BT2020)
_UNSPECIFIED, _RESERVED = 2, 3
_BT601, _BT601_AGAIN = 5, 6
_FULL = 2  # number of a range, as FFmpeg has it
_MATRIX_NAMES = {BT709: "BT.709", 4: "FCC", _BT601: "BT.601", 7: "SMPTE 240M", _BT2020: "BT.2020"}


@dataclass(frozen=True)
class Colour:
    """Colour description of a video.

    Attributes:
        matrix: from RGB to luma and chroma.
        primaries: of red, green and blue.
        transfer: from light to coded values.
        bits: of a coded value.
    """

    matrix: int = BT709
    primaries: int = BT709
    transfer: int = BT709
    bits: int = 8

    @classmethod
    def of_frame(cls, frame: Any) -> Colour:
        """Of an `av.VideoFrame`; primaries and transfer function that are not stated are those of BT.709."""
        matrix, primaries, transfer = (int(n) for n in (frame.colorspace, frame.color_primaries, frame.color_trc))
        return cls(
            matrix,
            BT709 if primaries in (0, _UNSPECIFIED, _RESERVED) else primaries,
            BT709 if transfer in (0, _UNSPECIFIED, _RESERVED) else transfer,
            max(component.bits for component in frame.format.components),
        )

    @property
    def known(self) -> bool:
        """Whether frames of this matrix are converted rightly; a matrix that is not stated is taken as BT.601."""
        return self.matrix in (*_KNOWN_MATRICES, _UNSPECIFIED, _RESERVED)

    @property
    def output(self) -> Colour:
        """What a video of 8 bits is written with: the same colours, by the matrix that players expect with them."""
        matrix = _BT2020 if self.primaries == _BT2020 else BT709
        return Colour(matrix, self.primaries, self.transfer)

    @property
    def high_dynamic_range(self) -> str | None:
        """PQ or HLG; None: standard dynamic range."""
        return _TRANSFERS.get(self.transfer)

    def __str__(self) -> str:
        gamut = ", BT.2020" if self.primaries == _BT2020 else ""
        return f"{self.high_dynamic_range or 'SDR'}{gamut}, {self.bits} bits"


def states_matrix(frame: Any) -> bool:
    """Whether an `av.VideoFrame` says which matrix it has."""
    return int(frame.colorspace) not in (_UNSPECIFIED, _RESERVED)


def matrix_of(frame: Any) -> int:
    """Matrix of an `av.VideoFrame` of luma and chroma: one that is not stated is taken as BT.601, as swscale does."""
    matrix = int(frame.colorspace)
    return _BT601 if matrix == _BT601_AGAIN or not states_matrix(frame) else matrix


def matrix_name(matrix: int) -> str:
    """For people."""
    return _MATRIX_NAMES.get(matrix, f"matrix {matrix} of ITU-T H.273")


def coded_range(frame: Any) -> CodedRange:
    """Range of an `av.VideoFrame` of luma and chroma: limited unless it says full, or has a format that is full."""
    return "full" if int(frame.color_range) == _FULL or frame.format.name.startswith("yuvj") else "limited"
