"""Events that an event camera would have seen in a video: to try a model without a camera."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.media.events.events import Events

__all__ = ["simulate_events"]

# Added to the intensity, 0 to 1: the logarithm of the darkest pixels would turn the noise of
# compression into events.
_DARK = 0.02
_LUMA = np.array([0.299, 0.587, 0.114])  # BT.601


def simulate_events(
    frames: Iterable[NDArray[Any]], fps: Fraction | float, *, threshold: float = 0.2
) -> Iterator[Events]:
    """Events between each frame and the next.

    The logarithm of a pixel's intensity is taken to change linearly between two frames; each time it
    has moved by `threshold` from where the last event was, there is an event, as in ESIM (Rebecq et
    al. 2018). Without noise, and without a refractory period: fewer frames a second than a camera's
    motion needs give trains of events that no sensor would send.

    Args:
        frames: pixels (H, W, C) uint8, C = 3 (RGB) or 1.
        fps: frames per second; the first one is at time zero.
        threshold: contrast, a difference of natural logarithms.
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
    """Events from `before` to `now`; `level`, where each pixel had its last one, is moved on."""
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
