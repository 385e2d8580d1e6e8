"""Scene cut detection by the correlation of consecutive frames.

Both frames are reduced to 16 x 16 means of sampled pixels. Their distance is one minus the correlation of these means,
0 to 2. It does not depend on brightness and contrast: switching on a light is not a cut, and the range of a float
frame need not be known. In the clips of `tests/runtime/streams/test_scene_cut.py` (five cuts within one clip, and
cuts made by joining two) the distance at a cut is 0.68 or more. The largest distance without a cut is 0.45, where a
van fills half the picture.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.nv12 import nv12_planes

__all__ = ["THRESHOLD", "SceneCut"]

THRESHOLD = 0.56  # midway between 0.45 and 0.68
_GRID = 16
_SAMPLES = 64  # along each side, so that the cost does not depend on the size of the frame


class SceneCut:
    """Compares each frame with the one before it."""

    def __init__(self) -> None:
        self._last: NDArray[np.float32] | None = None

    def distance(self, frame: NDArray[Any]) -> float:
        """Distance of this frame from that of the previous call: 0 for equal, 1 for unrelated pictures.

        It is 0 for the first frame and 1 for a frame of another size.

        Args:
            frame: pixels (H, W, C) uint8, NV12 (H * 3 // 2, W) uint8, or a float tensor (C, H, W).
        """
        last, self._last = self._last, _thumbnail(frame)
        if last is None:
            return 0.0
        if last.shape != self._last.shape:
            return 1.0
        power = float((last * last).sum() * (self._last * self._last).sum())
        if power == 0.0:  # a frame of one colour has no correlation: equal only to another such frame
            return 0.0 if not last.any() and not self._last.any() else 1.0
        return 1.0 - float((last * self._last).sum()) / math.sqrt(power)


def _thumbnail(frame: NDArray[Any]) -> NDArray[np.float32]:
    """Means of one channel over a grid of up to (16, 16), minus their mean."""
    frame = nv12_planes(frame)[0][..., None] if frame.ndim == 2 else frame
    channels = frame.shape[2 if frame.dtype == np.uint8 else 0]
    middle = channels // 2  # green of RGB
    plane = frame[..., middle] if frame.dtype == np.uint8 else frame[middle]
    height, width = plane.shape
    sampled = plane[:: max(1, height // _SAMPLES), :: max(1, width // _SAMPLES)].astype(np.float32)
    rows, columns = (max(1, size // _GRID) for size in sampled.shape)
    grid = sampled[: sampled.shape[0] // rows * rows, : sampled.shape[1] // columns * columns]
    means = grid.reshape(grid.shape[0] // rows, rows, -1, columns).mean((1, 3))
    centred: NDArray[np.float32] = means - means.mean()
    return centred
