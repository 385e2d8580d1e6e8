"""Latency statistics in constant memory, for runs of any length.

Durations are counted in a logarithmic histogram with 128 buckets per factor of two, from a microsecond to half an hour.
A percentile is within 0.4% of the exact one; mean, minimum and maximum are exact.
"""

from __future__ import annotations

import math
import time
from types import TracebackType

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Latency", "LatencySummary", "Stopwatch"]

PERCENTILES = (50, 90, 95, 99)
_PER_DOUBLING = 128
_DOUBLINGS = 31
_SMALLEST = 1e-6  # seconds
_GROUP = 256


class LatencySummary(msgspec.Struct, frozen=True, kw_only=True):
    """Durations in milliseconds; None: nothing was measured.

    Attributes:
        count: number of durations without the first.
        first_ms: the first duration, in which buffers are allocated and caches are cold; in no other figure.
    """

    count: int
    first_ms: float | None = None
    mean_ms: float | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None


class Latency:
    """Collects durations in seconds. The first one is recorded separately.

    Attributes:
        first: the first duration; None: nothing was measured.
    """

    def __init__(self) -> None:
        # Between two steps the code is not in the CPU's cache: durations are stored, and counted in groups.
        self._recent: list[float] = []
        self._buckets = np.zeros(_PER_DOUBLING * _DOUBLINGS, np.int64)
        self._count = 0
        self._sum = 0.0
        self._smallest = math.inf
        self._largest = 0.0
        self.first: float | None = None

    def add(self, seconds: float) -> None:
        """Add one duration."""
        if self.first is None:
            self.first = seconds
            return
        self._recent.append(seconds)
        if len(self._recent) == _GROUP:
            self._fold()

    def _fold(self) -> None:
        """Count the stored durations."""
        if not self._recent:
            return
        recent, self._recent = np.array(self._recent), []
        np.add.at(self._buckets, _bucket(recent), 1)
        self._count += len(recent)
        self._sum += math.fsum(recent)
        self._smallest = min(self._smallest, float(recent.min()))
        self._largest = max(self._largest, float(recent.max()))

    @property
    def mean(self) -> float | None:
        """Mean in seconds without the first duration; the first if there is no other."""
        self._fold()
        return self._sum / self._count if self._count else self.first

    def percentile(self, q: float) -> float | None:
        """The nearest-rank percentile in seconds: `q` percent of the durations are not above it."""
        self._fold()
        if not self._count:
            return None
        rank = max(1, math.ceil(q / 100 * self._count))
        if rank == self._count:
            return self._largest
        bucket = int(np.searchsorted(np.cumsum(self._buckets), rank))
        return min(max(_middle(bucket), self._smallest), self._largest)

    def summary(self) -> LatencySummary:
        """All figures, in milliseconds rounded to a tenth of a microsecond."""
        self._fold()

        def ms(seconds: float | None) -> float | None:
            return None if seconds is None else round(seconds * 1e3, 4)

        p50, p90, p95, p99 = (ms(self.percentile(q)) for q in PERCENTILES)
        return LatencySummary(
            count=self._count,
            first_ms=ms(self.first),
            mean_ms=ms(self._sum / self._count) if self._count else None,
            p50_ms=p50,
            p90_ms=p90,
            p95_ms=p95,
            p99_ms=p99,
            max_ms=ms(self._largest) if self._count else None,
        )


class Stopwatch:
    """Context manager that adds the duration of its block to a `Latency`, unless the block raises an error."""

    def __init__(self, latency: Latency) -> None:
        self._latency = latency

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._latency.add(time.perf_counter() - self._started)


def _bucket(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    mantissa, exponent = np.frexp(np.maximum(seconds, _SMALLEST) / _SMALLEST)  # mantissa in [0.5, 1)
    index = (exponent - 1) * _PER_DOUBLING + ((mantissa * 2 - 1) * _PER_DOUBLING).astype(np.int64)
    found: NDArray[np.int64] = np.minimum(index, _PER_DOUBLING * _DOUBLINGS - 1)
    return found


def _middle(bucket: int) -> float:
    doubling, part = divmod(bucket, _PER_DOUBLING)
    return math.ldexp(1 + (part + 0.5) / _PER_DOUBLING, doubling) * _SMALLEST
