"""Reset policy: decides before each frame whether the states of its stream are reset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime.streams.non_finite import OnNonFinite
from stepcell.runtime.streams.scene_cut import THRESHOLD, SceneCut

__all__ = ["CAUSES", "Cause", "OnSizeChange", "ResetMonitor", "ResetPolicy"]

Cause = Literal["every", "gap", "cut", "size", "demand", "non-finite"]
CAUSES: tuple[Cause, ...] = ("every", "gap", "cut", "size", "demand", "non-finite")


OnSizeChange = Literal["stop", "reset"]


@dataclass(frozen=True)
class ResetPolicy:
    """Conditions that reset the states of a stream.

    Attributes:
        every: before every frame whose number is a multiple of this.
        gap: after more than this many seconds without a frame, or a timestamp that decreases. None: after every
            reconnection.
        cut: at a scene cut (`stepcell.runtime.streams.scene_cut`).
        on_nonfinite: on NaN or Inf in a frame, an output or a state, "stop" ends the stream, "reset" resets the states
            and goes on, "ignore" does not check.
        on_size_change: at a frame of another size than the one before, "stop" ends the stream, "reset" resets the
            states and goes on.
    """

    every: int | None = None
    gap: float | None = None
    cut: bool = False
    on_nonfinite: OnNonFinite = "stop"
    on_size_change: OnSizeChange = "stop"


class ResetMonitor:
    """Applies a policy to one stream.

    It depends on the frame, its number and its timestamp only, so a resumed run resets at the same frames as one
    that was not interrupted.

    Attributes:
        counts: resets by cause.
    """

    def __init__(self, policy: ResetPolicy) -> None:
        self.policy = policy
        self.counts: dict[Cause, int] = dict.fromkeys(CAUSES, 0)
        self._cut = SceneCut() if policy.cut else None
        self._seconds: float | None = None
        self._connection = 0
        self._shape: tuple[int, ...] | None = None
        self._demanded = False

    def demand(self) -> None:
        """Reset before the next frame."""
        self._demanded = True

    def due(self, number: int, frame: NDArray[Any], seconds: float | None, connection: int = 0) -> Cause | None:
        """The cause for which to reset before this frame; call exactly once per frame, in order.

        Args:
            number: number of the frame in its stream, from 0; the first frame starts from the initial states anyway.
            frame: pixels (H, W, C) uint8 or a float tensor (C, H, W).
            seconds: timestamp on the clock of the source; None: not known.
            connection: number of reconnections before the frame.

        Raises:
            InputError: the policy has a gap and the timestamp is not known.
        """
        demanded, self._demanded = self._demanded, False
        reconnected, self._connection = connection != self._connection, connection
        gap = self._is_gap(number, seconds)
        cut = self._cut is not None and self._cut.distance(frame) > THRESHOLD
        resized, self._shape = self._shape not in (None, frame.shape), frame.shape
        if number == 0:
            return None
        if resized:
            return "size"
        if demanded:
            return "demand"
        if gap:
            return "gap"
        if cut:
            return "cut"
        if self.policy.every and number % self.policy.every == 0:
            return "every"
        return "gap" if reconnected and self.policy.gap is None else None

    def _is_gap(self, number: int, seconds: float | None) -> bool:
        if self.policy.gap is None:
            return False
        if seconds is None:
            raise InputError(
                f"frame {number}: has no timestamp, so gaps cannot be detected",
                hint="pictures and arrays have no timestamps: omit --reset-gap",
            )
        last, self._seconds = self._seconds, seconds
        return last is not None and not 0 <= seconds - last <= self.policy.gap
