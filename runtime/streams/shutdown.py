"""Stopping a stream cleanly on ctrl-C and SIGTERM."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

__all__ = ["StopRequest"]


class StopRequest:
    """Turns ctrl-C and SIGTERM into a clean stop between two steps.

    The run asks for it before every step and ten times a second while it waits, so that no file is
    cut off in the middle. A second signal interrupts at once, and ends the block of `listening`.

    Attributes:
        signal: the first one.
        hurried: whether a further one came while outputs were being finished, so that nothing is waited for.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.hurried = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block (main thread only)."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except KeyboardInterrupt:
            if self.signal is None:  # from elsewhere
                raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        self.signal = signal.Signals(number)
        if again:
            raise KeyboardInterrupt
