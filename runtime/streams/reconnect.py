"""Reconnection of a lost camera or URL: delays between attempts, and the time after which it is given up."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from stepcell.runtime.media.source import Source

__all__ = ["Reconnect"]


@dataclass(frozen=True)
class Reconnect:
    """Exponential backoff with jitter, so that several devices do not return to one server at the same moment.

    Attributes:
        open: opens the source again, or raises InputError.
        timeout: seconds after the last frame until the source is given up.
        first: largest delay before the first attempt, in seconds; doubled for each further one.
        most: upper limit of the delay, in seconds.
    """

    open: Callable[[], Source]
    timeout: float
    first: float = 0.5
    most: float = 30.0

    def delay(self, attempt: int) -> float:
        """Seconds to wait before attempt 0, 1, 2, ...: half of the largest delay or more, at random."""
        largest = min(self.most, self.first * 2.0 ** min(attempt, 32))
        return largest * random.uniform(0.5, 1.0)
