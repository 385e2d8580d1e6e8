"""When a stream forgets: reset policies, and the guard against NaN and Inf.

A policy belongs to one stream. It is asked before every frame and looks at the frame, its number
and its time only, so a run that was stopped and resumed resets where an uninterrupted one does.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.errors import InputError
from stepcell.runtime.streams.scene_cut import THRESHOLD, SceneCut

__all__ = [
    "CAUSES",
    "STATES_EVERY",
    "Cause",
    "OnNonFinite",
    "ResetPolicy",
    "ResetWatch",
    "non_finite",
    "non_finite_rows",
    "reset_on_signal",
]

Cause = Literal["every", "gap", "cut", "demand", "non-finite"]
OnNonFinite = Literal["stop", "reset", "ignore"]
CAUSES: tuple[Cause, ...] = ("every", "gap", "cut", "demand", "non-finite")
# Outputs are on the host and looked at in every step. States are on the device: reading them is a
# copy, so they are looked at once in so many frames. docs/run.md has what both cost.
STATES_EVERY = 100


@dataclass(frozen=True)
class ResetPolicy:
    """What makes a stream forget, before the frame that it happens at.

    Attributes:
        every: each multiple of this many frames.
        gap: more than these seconds between two frames, or a time that goes back.
        cut: a scene cut (`stepcell.runtime.streams.scene_cut`).
        on_nonfinite: NaN or Inf in an output or a state: end the stream, reset it and step the
            frame again, or take no notice.
    """

    every: int | None = None
    gap: float | None = None
    cut: bool = False
    on_nonfinite: OnNonFinite = "stop"


class ResetWatch:
    """Follows one stream by a policy and counts its resets by cause."""

    def __init__(self, policy: ResetPolicy) -> None:
        self.policy = policy
        self.counts: dict[Cause, int] = dict.fromkeys(CAUSES, 0)
        self._cut = SceneCut() if policy.cut else None
        self._seconds: float | None = None
        self._demanded = False

    def demand(self) -> None:
        """Ask for a reset before the next frame; from any thread or signal handler."""
        self._demanded = True

    def due(self, number: int, frame: NDArray[Any], seconds: float | None) -> Cause | None:
        """Whether to reset before this frame, and why. Every frame must be shown, once and in order.

        Args:
            number: of the frame in its stream, from 0.
            frame: pixels (H, W, C) uint8 or a tensor (C, H, W) of floats.
            seconds: when it was taken, on the source's own clock; None: not known.

        Raises:
            InputError: a time gap is asked for and the time is not known.
        """
        demanded, self._demanded = self._demanded, False
        gap = self._is_gap(number, seconds)
        cut = self._cut is not None and self._cut.distance(frame) > THRESHOLD
        if demanded:
            return "demand"
        if gap:
            return "gap"
        if cut:
            return "cut"
        return "every" if self.policy.every and number and number % self.policy.every == 0 else None

    def _is_gap(self, number: int, seconds: float | None) -> bool:
        if self.policy.gap is None:
            return False
        if seconds is None:
            raise InputError(
                f"frame {number}: has no time, so a gap between frames cannot be seen",
                hint="pictures and arrays have none; leave --reset-gap out",
            )
        last, self._seconds = self._seconds, seconds
        return last is not None and not 0 <= seconds - last <= self.policy.gap


def non_finite(outputs: Mapping[str, NDArray[Any]]) -> str | None:
    """Name of the first array that holds NaN or Inf."""
    return next((name for name, array in outputs.items() if not np.isfinite(array).all()), None)


def non_finite_rows(contract: StepContract, states: Mapping[str, NDArray[Any]]) -> dict[int, str]:
    """Rows of the batch whose states hold NaN or Inf, each with the name of one such state."""
    rows: dict[int, str] = {}
    for spec in contract.states:
        finite = np.isfinite(np.moveaxis(states[spec.name], spec.batch_axis, 0))
        for row in np.flatnonzero(~finite.reshape(len(finite), -1).all(1)):
            rows.setdefault(int(row), spec.name)
    return rows


@contextlib.contextmanager
def reset_on_signal(watches: Sequence[ResetWatch]) -> Iterator[None]:
    """SIGUSR1 demands a reset of these streams inside the block (main thread only).

    Args:
        watches: as they are when the signal comes, so that streams may be opened inside the block.
    """

    def handle(*_: object) -> None:
        for watch in watches:
            watch.demand()

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
