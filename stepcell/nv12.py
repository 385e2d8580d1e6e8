"""NV12: the frames of decoders and cameras, a plane of luma and half as many rows of chroma below it.

A frame of H rows and W columns, both even, is (H * 3 // 2, W) bytes: H rows of luma Y, then H / 2 rows in which the
chroma samples U and V of a block of 2 x 2 pixels alternate. How it becomes RGB depends on a matrix and a range that the
bytes do not show (ITU-T H.273, 8.3 and 8.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from stepcell.contract import TensorSpec

__all__ = ["CodedRange", "Matrix", "Nv12", "nv12_fault", "nv12_of", "nv12_planes", "nv12_to_rgb", "rows_of"]

Matrix = Literal["bt601", "bt709", "fcc", "smpte240m", "bt2020"]
CodedRange = Literal["limited", "full"]

# Weights of red and blue in luma (H.273, table 4), and the number of the matrix there; BT.601 has a second one, 6.
_WEIGHTS: dict[Matrix, tuple[float, float]] = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "fcc": (0.30, 0.11),
    "smpte240m": (0.212, 0.087),
    "bt2020": (0.2627, 0.0593),
}
_NUMBERS: dict[Matrix, int] = {"bt601": 5, "bt709": 1, "fcc": 4, "smpte240m": 7, "bt2020": 9}
_NAMES = {"bt601": "BT.601", "bt709": "BT.709", "fcc": "FCC", "smpte240m": "SMPTE 240M", "bt2020": "BT.2020"}


class Nv12(msgspec.Struct, frozen=True, kw_only=True):
    """How the frames of a file that takes NV12 become RGB.

    Attributes:
        matrix: from RGB to luma and chroma.
        range: of the coded values: luma 16 to 235 and chroma 16 to 240 (limited), or 0 to 255 (full).
    """

    matrix: Matrix
    range: CodedRange

    @property
    def number(self) -> int:
        """Number of the matrix in ITU-T H.273."""
        return _NUMBERS[self.matrix]

    def coefficients(self) -> tuple[float, float, NDArray[np.float64]]:
        """Gain and offset of luma, and (3, 2) of U - 128 and V - 128: RGB = gain * (Y - offset) + chroma @ (U, V)."""
        red, blue = _WEIGHTS[self.matrix]
        green = 1 - red - blue
        gain, offset, scale = (1.0, 0.0, 1.0) if self.range == "full" else (255 / 219, 16.0, 255 / 224)
        of_u, of_v = 2 * (1 - blue) * scale, 2 * (1 - red) * scale
        return gain, offset, np.array([[0, of_v], [-blue / green * of_u, -red / green * of_v], [of_u, 0]])

    def __str__(self) -> str:
        return f"{_NAMES[self.matrix]}, {self.range} range"


def nv12_of(spec: TensorSpec) -> Nv12 | None:
    """How the NV12 of an input is converted in its graph; None: it takes none."""
    found = spec.converts.nv12 if spec.converts else None
    return found if isinstance(found, Nv12) else None


def rows_of(height: int | str) -> int | str:
    """Rows of a frame with its chroma: of a number, or of a symbol."""
    return height * 3 // 2 if isinstance(height, int) else f"{height} * 3 // 2"


def nv12_fault(rows: int, columns: int) -> str | None:
    """Why a frame of so many rows and columns is not NV12; None: it may be."""
    if rows % 3 == 0 and columns % 2 == 0:
        return None
    return f"NV12 of H x W pixels, both even, is (H * 3 // 2, W) bytes, got {rows} rows and {columns} columns"


def nv12_planes(frame: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Views of a frame (..., H * 3 // 2, W): luma (..., H, W) and chroma (..., H // 2, W // 2, 2)."""
    rows, columns = frame.shape[-2:]
    height = rows // 3 * 2
    return frame[..., :height, :], frame[..., height:, :].reshape(*frame.shape[:-2], height // 2, columns // 2, 2)


def nv12_to_rgb(frame: NDArray[np.uint8], how: Nv12) -> NDArray[np.float32]:
    """Frames (..., H * 3 // 2, W) as RGB (..., H, W, 3) of 0 to 255, not rounded; the graph computes the same.

    A chroma sample is that of all four pixels of its block, as in swscale's conversion of yuv420p to rgb24.
    """
    gain, offset, chroma = how.coefficients()
    luma, colour = nv12_planes(frame)
    added = (colour.astype(np.float32) - np.float32(128)) @ chroma.T.astype(np.float32)
    added = added.repeat(2, -3).repeat(2, -2)
    rgb = (luma.astype(np.float32) - np.float32(offset))[..., None] * np.float32(gain) + added
    clipped: NDArray[np.float32] = np.clip(rgb, 0, 255)
    return clipped
