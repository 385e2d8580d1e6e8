"""Event simulator: events that an event camera would have recorded of a video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.media.events.columns import Events

__all__ = ["simulate_events"]

# Added to the intensity (0 to 1) before the logarithm, which would amplify compression noise of dark pixels to events.
_DARK = 0.02
_LUMA = np.array([0.299, 0.587, 0.114])  # BT.601


def simulate_events(
    frames: Iterable[NDArray[Any]], fps: Fraction | float, *, threshold: float = 0.2
) -> Iterator[Events]:
    """Events between each frame and the next.

    As in ESIM (Rebecq et al. 2018), the logarithm of a pixel's intensity changes linearly between two frames, and
    an event is emitted each time it has changed by `threshold` since the last event. Noise and refractory period are
    not simulated; at a low frame rate, fast motion gives bursts of events that no sensor would send.

    Args:
        frames: pixels (H, W, C) uint8, C = 3 (RGB) or 1.
        fps: frames per second; the first frame is at time zero.
        threshold: contrast, as a difference of natural logarithms.
    """
    level: NDArray[np.float64] | None = None
    before = np.empty(0)
    for number, frame in enumerate(frames):
        now = _log_intensity(frame)
        if level is None:
            level = now.copy()
        else:
            start, end = ((number + offset) * 1e6 / float(fps) for offset in (-1, 0))
            yield _between(before, now, level, threshold, start, end)
        before = now


def _log_intensity(frame: NDArray[Any]) -> NDArray[np.float64]:
    grey = frame[..., 0] if frame.shape[2] == 1 else frame @ _LUMA
    result: NDArray[np.float64] = np.log(grey / 255 + _DARK)
    return result


def _between(
    before: NDArray[np.float64],
    now: NDArray[np.float64],
    level: NDArray[np.float64],
    threshold: float,
    start: float,
    end: float,
) -> Events:
    """Events between the frames `before` and `now`; updates `level`, the log intensity at each pixel's last event."""
    crossings = np.trunc((now - level) / threshold).astype(np.int64)
    y, x = np.nonzero(crossings)
    counts = crossings[y, x]
    each = np.repeat(np.arange(len(counts)), np.abs(counts))
    which = np.arange(len(each)) - np.repeat(np.cumsum(np.abs(counts)) - np.abs(counts), np.abs(counts)) + 1
    rising = counts[each] > 0
    y, x = y[each], x[each]
    crossed = level[y, x] + which * np.where(rising, threshold, -threshold)
    share = (crossed - before[y, x]) / (now[y, x] - before[y, x])
    t = np.floor(start + np.clip(share, 0, 1) * (end - start)).astype(np.int64)
    order = np.argsort(t, kind="stable")
    level += crossings * threshold
    return Events.of(x[order], y[order], rising[order], t[order])
