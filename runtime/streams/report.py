"""What a run did, as JSON for a machine; and the error of a run that broke half-way."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import msgspec

from stepcell.errors import StepcellError
from stepcell.runtime.loop.latency import LatencySummary
from stepcell.runtime.streams.reset_policy import Cause

__all__ = ["Dropped", "RunReport", "Stopped", "StreamError", "StreamsError", "StreamsReport", "blame", "with_rest"]

Stopped = Literal["end of input", "limit", "interrupted", "error"]
Dropped = dict[Literal["late", "queue full"], int]


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did with one stream; `docs/run.md` explains the fields.

    Attributes:
        first_frame: number of the first one; above zero where a run was resumed.
        frames: frames stepped.
        written: frames in the output: all of them, unless it could not be written. None: no output.
        dropped: frames that were read and not stepped: older than the deadline, or read while the
            queue was full.
        late: frames that were stepped though they were older than the deadline.
        resets: how often the past was forgotten, by cause.
        non_finite: frames at which NaN or Inf was seen.
        reconnects: how often the input was lost and came back.
        snapshots, failed_snapshots: written, and those that could not be.
        seconds: wall time from the first read to the closed output.
        frames_per_second: frames by seconds, everything included.
        latency: time from a frame's arrival until its result was handed to the output.
        step, decode, convert, encode: time per frame in `StepLoop.step`, in reading, in scaling
            both ways, in writing. Each keeps its first one apart.
    """

    model: str
    backend: str
    device: str
    input: str
    output: str | None
    output_tensor: str | None
    frame_size: tuple[int, int] | None  # width, height
    first_frame: int
    frames: int
    written: int | None
    dropped: Dropped
    late: int
    resets: dict[Cause, int]
    non_finite: int
    reconnects: int
    snapshots: int
    failed_snapshots: int
    stopped: Stopped
    error: str | None
    seconds: float
    frames_per_second: float
    latency: LatencySummary
    step: LatencySummary
    decode: LatencySummary
    convert: LatencySummary
    encode: LatencySummary


class StreamError(StepcellError):
    """A stream that broke half-way: the cause's message and exit code, and the report so far."""

    def __init__(self, cause: StepcellError, report: RunReport) -> None:
        super().__init__(cause.message, hint=cause.hint)
        self.exit_code = cause.exit_code
        self.report = report


class StreamsReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a run of several inputs did: a report for each, in the order they were given in."""

    model: str
    streams: list[RunReport]


def with_rest(error: StepcellError, rest: str) -> StepcellError:
    """The same error, whose message says what is left as well; one error may have ended several streams."""
    told = copy.copy(error)
    told.message += rest
    told.args = (told.message,)
    return told


def blame(name: str, error: StepcellError) -> str:
    """What broke a stream, with its name in front; many errors begin with it."""
    return error.message if error.message.startswith(f"{name}: ") else f"{name}: {error.message}"


class StreamsError(StepcellError):
    """Some of several streams broke; the others went on to their end.

    The exit code is that of what broke them, or 1 where these differ.
    """

    def __init__(self, failures: Mapping[str, StepcellError], count: int) -> None:
        lines = "".join(f"\n  {blame(name, error)}" for name, error in failures.items())
        hints = {error.hint for error in failures.values()}
        super().__init__(
            f"{len(failures)} of {count} streams broke:{lines}", hint=hints.pop() if len(hints) == 1 else None
        )
        codes = {error.exit_code for error in failures.values()}
        self.exit_code = codes.pop() if len(codes) == 1 else 1
