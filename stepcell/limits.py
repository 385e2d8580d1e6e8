"""Limits of what a file may demand: each has a name, a figure, and an environment variable of that name to change it.

Without them a model of 30 kB keeps a build busy for ever, and a loop in a graph keeps a run from its first step.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from stepcell.errors import InputError, UsageError

__all__ = [
    "EMPTY_WINDOWS",
    "FIRST_STEP_SECONDS",
    "LOOP_ITERATIONS",
    "MODEL_BYTES",
    "NESTING",
    "NODES",
    "STEP_SECONDS",
    "Limit",
    "within_seconds",
]

_T = TypeVar("_T")
GRACE_SECONDS = 5.0  # for work that was asked to stop


@dataclass(frozen=True)
class Limit:
    """One limit.

    Attributes:
        name: the environment variable that changes it.
        default: the figure without that variable.
        unit: for messages.
    """

    name: str
    default: float
    unit: str

    @property
    def value(self) -> float:
        """The figure in force.

        Raises:
            UsageError: the environment variable is no number above zero.
        """
        text = os.environ.get(self.name)
        if text is None:
            return self.default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not value > 0:
            raise UsageError(f"{self.name}: expected a number above zero, got {text!r}")
        return value

    def check(self, found: float, subject: str, what: str) -> None:
        """Raise InputError if a file demands more; the message has both figures and the switch."""
        limit = self.value
        if found > limit:
            raise InputError(
                f"{subject}: {what}: {found:,.0f} {self.unit}, at most {limit:,.0f} are accepted", hint=self.hint(found)
            )

    def hint(self, found: float) -> str:
        """How to lift the limit."""
        return f"if you trust it: {self.name}={found:.0f} in the environment (docs/security.md)"


NODES = Limit("STEPCELL_MAX_NODES", 100_000, "nodes")
NESTING = Limit("STEPCELL_MAX_NESTING", 50, "levels")
MODEL_BYTES = Limit("STEPCELL_MAX_MODEL_BYTES", 16 << 30, "bytes")
FIRST_STEP_SECONDS = Limit("STEPCELL_FIRST_STEP_SECONDS", 120, "seconds")
STEP_SECONDS = Limit("STEPCELL_STEP_SECONDS", 600, "seconds")
LOOP_ITERATIONS = Limit("STEPCELL_MAX_LOOP_ITERATIONS", 10_000, "iterations")
EMPTY_WINDOWS = Limit("STEPCELL_MAX_EMPTY_WINDOWS", 10_000_000, "windows")


def within_seconds(limit: Limit, call: Callable[[], _T], subject: str, *, stop: Callable[[], None] | None = None) -> _T:
    """The result of a call into a library that may never return, made in a thread of its own.

    Args:
        limit: time that it may take.
        subject: what it does, for the message, such as "model.onnx: the first step".
        stop: asks the library to stop, after the limit. A thread that does not end is left behind; the command line
            ends the process all the same.

    Raises:
        InputError: it took longer.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised below, in the calling thread
            errors.append(error)

    seconds = limit.value
    thread = threading.Thread(target=work, name=subject, daemon=True)
    thread.start()
    thread.join(min(seconds, threading.TIMEOUT_MAX))
    if thread.is_alive():
        if stop is not None:
            stop()
            thread.join(GRACE_SECONDS)
        raise InputError(f"{subject}: not finished after {seconds:g} seconds", hint=limit.hint(10 * seconds))
    if errors:
        raise errors[0]
    return results[0]
