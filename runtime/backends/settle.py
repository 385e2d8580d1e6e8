"""Waiting for other back ends before one is timed."""

from __future__ import annotations

import time

__all__ = ["settle"]


def settle(seconds: float) -> None:
    """Wait until threads of the back end before have stopped spinning, so that they slow no other down.

    Args:
        seconds: at most.
    """
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        wall, own = time.perf_counter(), time.process_time()
        time.sleep(0.002)
        if time.process_time() - own < 0.2 * (time.perf_counter() - wall):
            return
