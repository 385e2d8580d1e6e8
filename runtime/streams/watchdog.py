"""Watchdog: a step that does not return is ended where the back end can do that; otherwise the run is given up."""

from __future__ import annotations

import threading
from collections.abc import Callable

from stepcell.errors import DeviceError
from stepcell.limits import FIRST_STEP_SECONDS, GRACE_SECONDS, STEP_SECONDS

__all__ = ["Watchdog"]

TICKS = 20  # in the time that a step may take, but at most one a second


class Watchdog:
    """Watches the steps of a run from a thread of its own.

    It counts its own waits instead of reading a clock, so the time in which a machine sleeps or the process is stopped
    does not count.

    Args:
        name: the model, for the message.
        interrupt: asks the back end to end the step with an error.
        give_up: called in the thread of the watchdog with the error, if the step goes on nevertheless.

    Raises:
        UsageError: the limit in the environment is no number above zero.
    """

    def __init__(self, name: str, interrupt: Callable[[], None], give_up: Callable[[DeviceError], None]) -> None:
        self._name, self._interrupt, self._give_up = name, interrupt, give_up
        self._seconds = STEP_SECONDS.value
        self._first_seconds = max(self._seconds, FIRST_STEP_SECONDS.value)
        self._lock = threading.Lock()
        self._frames: Callable[[], str] | None = None  # of the current step; None: no step runs
        self._steps = 0
        self._error: DeviceError | None = None  # of the current step, if it is late
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def begin(self, frames: Callable[[], str]) -> None:
        """A step begins.

        Args:
            frames: says which frames it steps, for the message.
        """
        with self._lock:
            self._steps += 1
            self._frames = frames

    def end(self) -> None:
        """The step has ended.

        Raises:
            DeviceError: too late.
        """
        with self._lock:
            self._frames, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _watch(self) -> None:
        tick = min(1.0, self._seconds / TICKS)
        number, waited = 0, 0.0
        while not self._closed.wait(tick):
            with self._lock:
                if self._frames is None or self._steps != number:
                    number, waited = self._steps, 0.0
                    continue
                waited += tick
                limit = self._first_seconds if number == 1 else self._seconds
                if waited < limit or self._error is not None:
                    continue
                error = self._error = DeviceError(
                    f"{self._name}: step {number} has not returned for {limit:g} seconds ({self._frames()})",
                    hint="a driver that hangs, or a model with a loop that does not end; for one that is so slow: "
                    f"{STEP_SECONDS.name}={10 * limit:g} in the environment (docs/security.md)",
                )
                self._interrupt()
            if not self._closed.wait(GRACE_SECONDS):
                with self._lock:
                    hangs = self._error is error
                if hangs:
                    self._give_up(error)
