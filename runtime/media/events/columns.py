"""Events: columns x, y, polarity and time of the events of a camera."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Events"]

_DTYPES = (np.uint16, np.uint16, np.bool_, np.int64)


@dataclass(frozen=True)
class Events:
    """Events in order of time.

    Attributes:
        x, y: pixel, (n,) uint16, from the upper left corner; from a reader also of a wider integer dtype.
        p: polarity, (n,) bool: True if the pixel became brighter.
        t: time, (n,) int64, microseconds.
    """

    x: NDArray[np.integer[Any]]
    y: NDArray[np.integer[Any]]
    p: NDArray[np.bool_]
    t: NDArray[np.int64]

    @classmethod
    def of(cls, x: NDArray[Any], y: NDArray[Any], p: NDArray[Any], t: NDArray[Any]) -> Events:
        """Convert columns of any integer dtype."""
        return cls(*(column.astype(dtype, copy=False) for column, dtype in zip((x, y, p, t), _DTYPES, strict=True)))

    @classmethod
    def empty(cls, count: int) -> Events:
        """Columns to be filled."""
        x, y = np.empty(count, np.uint16), np.empty(count, np.uint16)
        return cls(x, y, np.empty(count, np.bool_), np.empty(count, np.int64))

    @classmethod
    def join(cls, parts: Sequence[Events]) -> Events:
        """Concatenate parts in their order; without a part, no events."""
        if len(parts) == 1:
            return parts[0]
        empty = np.empty(0, np.int64)
        parts = parts or [cls.of(empty, empty, empty, empty)]
        x, y, p, t = (np.concatenate([getattr(part, name) for part in parts]) for name in "xypt")
        return cls(x, y, p, t)

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, rows: slice) -> Events:
        return Events(self.x[rows], self.y[rows], self.p[rows], self.t[rows])
