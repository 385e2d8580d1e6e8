"""Signals of `stepcell run`: ctrl-C and SIGTERM stop it, SIGUSR1 resets the states."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from stepcell.runtime.streams.run_control import RunControl

__all__ = ["SignalControl", "signal_control"]


class SignalControl(RunControl):
    """The control of a run that is stopped by signals.

    Attributes:
        signal: the last one that stopped it; None: none did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.signal: signal.Signals | None = None


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
