"""The control of `stepcell run`: ctrl-C and SIGTERM stop it, SIGUSR1 resets the states; a step that hangs ends it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from stepcell.cli.console import print_error
from stepcell.errors import DeviceError
from stepcell.runtime.streams.run_control import RunControl

__all__ = ["SignalControl", "signal_control"]


class SignalControl(RunControl):
    """The control of a run that has the process to itself and is stopped by signals.

    Attributes:
        signal: the last one that stopped it; None: none did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.signal: signal.Signals | None = None

    def give_up(self, error: DeviceError) -> None:
        """End the process as a kill would, but in words: the next run recovers the frames that were written."""
        print_error(error)
        os._exit(error.exit_code)


@contextlib.contextmanager
def signal_control() -> Iterator[SignalControl]:
    """Handle signals inside the block (main thread only).

    The first ctrl-C or SIGTERM stops the run after the current step. A further one raises KeyboardInterrupt, which
    does not wait for the step, and ends the block. SIGUSR1 resets the states of every stream.
    """
    control = SignalControl()

    def stop(number: int, _: object) -> None:
        again, control.signal = control.signal is not None, signal.Signals(number)
        control.stop()
        if again:
            raise KeyboardInterrupt

    def reset(*_: object) -> None:
        control.reset()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, reset)
    try:
        yield control
    except KeyboardInterrupt:
        if control.signal is None:  # raised by something else
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
