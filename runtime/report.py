"""What a run did, as JSON for a machine; and the error of a run that broke half-way."""

from __future__ import annotations

from typing import Literal

import msgspec

from stepcell.errors import OutputError, StepcellError
from stepcell.runtime.policies import Cause
from stepcell.runtime.statistics import LatencySummary

__all__ = ["RunReport", "Stopped", "StreamError"]

Stopped = Literal["end of input", "limit", "interrupted", "error"]


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did; `docs/run.md` explains the fields.

    Attributes:
        first_frame: number of the first one; above zero where a run was resumed.
        frames: frames stepped, and written where there is an output.
        resets: how often the past was forgotten, by cause.
        snapshots, failed_snapshots: written, and those that could not be.
        seconds: wall time from the first read to the closed output.
        frames_per_second: frames by seconds, everything included.
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
    resets: dict[Cause, int]
    snapshots: int
    failed_snapshots: int
    stopped: Stopped
    error: str | None
    seconds: float
    frames_per_second: float
    step: LatencySummary
    decode: LatencySummary
    convert: LatencySummary
    encode: LatencySummary


class StreamError(StepcellError):
    """A stream that broke half-way: the cause's message and exit code, and the report so far."""

    def __init__(self, cause: StepcellError, report: RunReport) -> None:
        kept = f" ({report.output} holds the {report.frames} frames before it)"
        whole = report.frames > 0 and report.output is not None and not isinstance(cause, OutputError)
        super().__init__(cause.message + (kept if whole else ""), hint=cause.hint)
        self.exit_code = cause.exit_code
        self.report = report
