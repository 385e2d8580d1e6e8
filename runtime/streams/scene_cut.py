"""Scene cuts: whether a frame goes on from the one before it.

Both frames are reduced to 16 x 16 means of sampled pixels. Their distance is one minus the
correlation of these, 0 to 2: brightness and contrast cancel out, so a light that is switched on
is no cut, and neither pixels nor a model's own range have to be known. In the real clips of
`tests/runtime/streams/test_scene_cut.py` (five cuts inside one of them, and those made by joining two) a cut is
0.68 or more, and the largest distance without one 0.45, where a van fills half the picture.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["THRESHOLD", "SceneCut"]

THRESHOLD = 0.56  # half-way between the two
_GRID = 16
_SAMPLES = 64  # along each side: a frame costs the same at any size


class SceneCut:
    """Compares each frame with the one before it."""

    def __init__(self) -> None:
        self._last: NDArray[np.float32] | None = None

    def distance(self, frame: NDArray[Any]) -> float:
        """How far this frame is from the last one given: 0 the same picture, 1 unrelated; 0 for the first.

        Args:
            frame: pixels (H, W, C) uint8 or a tensor (C, H, W) of floats. One of another size is unrelated.
        """
        last, self._last = self._last, _thumbnail(frame)
        if last is None:
            return 0.0
        if last.shape != self._last.shape:
            return 1.0
        power = float((last * last).sum() * (self._last * self._last).sum())
        if power == 0.0:  # at least one is of one colour; from there to a picture all is new
            return 0.0 if not last.any() and not self._last.any() else 1.0
        return 1.0 - float((last * self._last).sum()) / math.sqrt(power)


def _thumbnail(frame: NDArray[Any]) -> NDArray[np.float32]:
    """Means of one channel over a grid, about their own mean: up to (16, 16)."""
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
