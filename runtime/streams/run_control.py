"""Run control: stops a run, or resets its states, from another thread or a signal handler."""

from __future__ import annotations

from stepcell.errors import DeviceError

__all__ = ["RunControl"]


class RunControl:
    """Requests to a run, which looks for them before every step and at least ten times a second.

    All methods return at once and may be called from any thread or signal handler.

    Attributes:
        stopping: `stop` was called.
        aborting: `abort` was called.
        resets: number of calls of `reset`.
    """

    def __init__(self) -> None:
        self.stopping: bool = False
        self.aborting: bool = False
        self.resets: int = 0

    def stop(self) -> None:
        """End the run after the current step; outputs are finished as valid files."""
        self.stopping = True

    def abort(self) -> None:
        """End the run, and do not wait for outputs that are not finished, such as those on a disk that hangs."""
        self.stopping = self.aborting = True

    def reset(self) -> None:
        """Reset the states of every stream before its next frame."""
        self.resets += 1

    def give_up(self, error: DeviceError) -> None:
        """A step hangs in a library and cannot be ended. The run calls this in another thread; it does nothing here.

        `run_streams` then waits on, since only the end of the process ends such a step: `stepcell run` ends it.

        Args:
            error: which step, and for how long.
        """
