"""Report of a run, and the error of a run with failed streams."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import msgspec

from stepcell.errors import StepcellError
from stepcell.json_text import json_text
from stepcell.runtime.loop.latency import LatencySummary
from stepcell.runtime.media.source import BadEventCounts
from stepcell.runtime.streams.reset_policy import Cause

__all__ = ["Dropped", "RunError", "RunReport", "Stopped", "StreamReport", "append_message", "with_name"]

Stopped = Literal["end of input", "limit", "interrupted", "error"]
Dropped = dict[Literal["late", "queue full"], int]


class StreamReport(msgspec.Struct, frozen=True, kw_only=True):
    """Report of one stream; docs/run.md explains the fields.

    Attributes:
        frame_size: (width, height) in pixels.
        first_frame: number of the first frame; above zero in a resumed run.
        frames: frames stepped.
        written: frames in the output: all of them unless writing failed. None: no output.
        dropped: frames decoded and not stepped, because they were late or the queue was full.
        late: late frames that were stepped.
        resets: resets of the states, by cause.
        non_finite: frames after which NaN or Inf was found.
        bad_events: events outside the sensor or earlier than the one before, by kind; empty for pictures.
        reconnects: number of times the input was lost and reopened.
        server_events: with --server, how often a request was not answered, the state was lost and continued, and frames
            were sent again, by kind; empty for steps on this machine.
        snapshots: number of snapshots written.
        failed_snapshots: number of snapshots that could not be written.
        resumes_at: frame at which `--resume` continues with the last snapshot written; None: none was.
        stopped: why the stream ended.
        error: message of the failure; None: no failure.
        seconds: wall time from the first read to the closed output.
        frames_per_second: `frames` by `seconds`.
        latency: from the arrival of a frame until its result was queued for the output.
        step, decode, convert, encode: time per frame in `StepLoop.step`, decoding, pre- and postprocessing, and
            encoding. The first frame is listed separately.
    """

    model: str
    backend: str
    device: str
    input: str
    output: str | None
    output_tensor: str | None
    frame_size: tuple[int, int] | None
    first_frame: int
    frames: int
    written: int | None
    dropped: Dropped
    late: int
    resets: dict[Cause, int]
    non_finite: int
    bad_events: BadEventCounts
    reconnects: int
    server_events: dict[str, int]
    snapshots: int
    failed_snapshots: int
    resumes_at: int | None
    stopped: Stopped
    error: str | None
    seconds: float
    frames_per_second: float
    latency: LatencySummary
    step: LatencySummary
    decode: LatencySummary
    convert: LatencySummary
    encode: LatencySummary


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """Report of a run.

    Attributes:
        model: name of the model.
        streams: report of each stream, in the order of the inputs.
    """

    model: str
    streams: list[StreamReport]

    @property
    def document(self) -> StreamReport | RunReport:
        """The object written as JSON: the report of the only stream, or the report of the run."""
        return self.streams[0] if len(self.streams) == 1 else self

    def to_json(self) -> str:
        """`document` as JSON."""
        return json_text(self.document) + "\n"


class RunError(StepcellError):
    """Streams failed, or the report could not be written; the other streams ran to their end.

    Message, hint and exit code are those of the cause. If several streams failed, the message lists them; the hint
    and the exit code are theirs if all agree, else none and 1.

    Attributes:
        report: report of the run.
    """

    def __init__(self, cause: StepcellError, report: RunReport) -> None:
        super().__init__(cause.message, hint=cause.hint)
        self.exit_code: int = cause.exit_code
        self.report: RunReport = report

    @classmethod
    def of_streams(cls, failures: Mapping[str, StepcellError], report: RunReport) -> RunError:
        """For the failures of streams, by the name of the stream."""
        if len(report.streams) == 1:
            return cls(next(iter(failures.values())), report)
        lines = "".join(f"\n  {with_name(name, error)}" for name, error in failures.items())
        hints = {error.hint for error in failures.values()}
        cause = StepcellError(
            f"{len(failures)} of {len(report.streams)} streams failed:{lines}",
            hint=hints.pop() if len(hints) == 1 else None,
        )
        codes = {error.exit_code for error in failures.values()}
        cause.exit_code = codes.pop() if len(codes) == 1 else 1
        return cls(cause, report)


def append_message(error: StepcellError, text: str) -> StepcellError:
    """A copy of an error with a longer message; the original may belong to several streams."""
    longer = copy.copy(error)
    longer.message += text
    longer.args = (longer.message,)
    return longer


def with_name(name: str, error: StepcellError) -> str:
    """The message of an error, preceded by the name of the stream unless it begins with it."""
    return error.message if error.message.startswith(f"{name}: ") else f"{name}: {error.message}"
