"""Decoded frames as NV12: the bytes of the decoder where it gives 8 bits, 4:2:0, of the matrix and range asked for."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.nv12 import Nv12, nv12_planes, rows_of
from stepcell.runtime.media.colour import coded_range, matrix_name, matrix_of, states_matrix
from stepcell.runtime.media.orientation import Orientation

__all__ = ["Nv12Frames"]

logger = logging.getLogger(__name__)

_SUBSAMPLED = ("yuv420p", "yuvj420p", "nv12")
_NUMBER_OF_RANGE = {"limited": 1, "full": 2}  # of FFmpeg's AVColorRange


class Nv12Frames:
    """Converts `av.VideoFrame`s of one source.

    Frames of another format, matrix or range are converted by swscale, as those of every source are for a model that
    takes RGB. That is said for the first frame, and again where it changes.

    Args:
        how: matrix and range of the result.
        name: of the source, for messages.
    """

    def __init__(self, how: Nv12, name: str) -> None:
        self._how, self._name = how, name
        self._seen: tuple[Any, ...] | None = None
        self._as_it_is = False

    def __call__(self, frame: Any, orientation: Orientation) -> NDArray[np.uint8]:
        """(H * 3 // 2, W), upright.

        Raises:
            InputError: the height or the width is odd, or the frame is grey.
        """
        if frame.height % 2 or frame.width % 2:
            raise InputError(
                f"{self._name}: {frame.width}x{frame.height}, and NV12 has an even width and height",
                hint="use a file of --pixels uint8, or cut the clip first, such as: "
                "ffmpeg -i INPUT -vf 'crop=trunc(iw/2)*2:trunc(ih/2)*2' OUTPUT",
            )
        seen = frame.format.name, frame.colorspace, frame.color_range
        if seen != self._seen:
            self._seen, self._as_it_is = seen, self._look(frame)
        if not self._as_it_is:
            frame = frame.reformat(
                format="nv12", dst_colorspace=self._how.number, dst_color_range=_NUMBER_OF_RANGE[self._how.range]
            )
        return _upright(_interleaved(frame), orientation)

    def _look(self, frame: Any) -> bool:
        """Whether the bytes of frames like this one are taken as they are; if not, it is said."""
        if len(frame.format.components) <= 2 and not frame.format.has_palette:
            raise InputError(
                f"{self._name}: the model takes NV12, which is in colour, the frames are greyscale",
                hint="convert them first, such as: ffmpeg -i INPUT -pix_fmt yuv420p OUTPUT",
            )
        if frame.format.is_rgb or frame.format.has_palette:
            found = f"RGB ({frame.format.name})"
        else:
            matrix, coded = matrix_of(frame), coded_range(frame)
            if frame.format.name in _SUBSAMPLED and (matrix, coded) == (self._how.number, self._how.range):
                return True
            taken = "" if states_matrix(frame) else " (not stated, and taken as that)"
            found = f"{frame.format.name}, {matrix_name(matrix)}{taken}, {coded} range"
        logger.warning(
            f"{self._name}: the file takes NV12 of {self._how}, and the frames are {found}: converted on the host; "
            "a file exported with their --matrix and --coded-range takes 8 bits of 4:2:0 as they are"
        )
        return False


def _interleaved(frame: Any) -> NDArray[np.uint8]:
    """(H * 3 // 2, W) of a frame of yuv420p or nv12; the only copy of its bytes."""
    packed = np.empty((int(rows_of(frame.height)), frame.width), np.uint8)
    luma, chroma = nv12_planes(packed)
    planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height] for plane in frame.planes]
    luma[...] = planes[0][:, : frame.width]
    if len(planes) == 2:
        chroma[...] = planes[1][:, : frame.width].reshape(chroma.shape)
    else:
        for axis, plane in enumerate(planes[1:]):
            chroma[..., axis] = plane[:, : frame.width // 2]
    return packed


def _upright(frame: NDArray[np.uint8], orientation: Orientation) -> NDArray[np.uint8]:
    if orientation == Orientation():
        return frame
    luma, chroma = (orientation(plane) for plane in nv12_planes(frame))
    turned = np.empty((int(rows_of(luma.shape[0])), luma.shape[1]), np.uint8)
    for place, plane in zip(nv12_planes(turned), (luma, chroma), strict=True):
        place[...] = plane
    return turned
