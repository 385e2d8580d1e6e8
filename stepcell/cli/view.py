"""View of `stepcell run`: progress while the streams run, and the summary at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from stepcell.cli.console import LiveTable, console, log, stage, table
from stepcell.runtime.loop.latency import Latency, LatencySummary
from stepcell.runtime.streams.progress import RunProgress, StreamProgress
from stepcell.runtime.streams.report import RunReport

__all__ = ["View"]

LIVE_SECONDS = 0.2  # interval between two updates of a terminal
PLAIN_SECONDS = 5.0  # interval between two lines of a log
COLUMNS = ("stream", "frames", "frames/s", "p50 ms", "p95 ms", "p99 ms", "queue", "dropped", "resets", "lost", "")


class View:
    """Progress callback: a live table with a row per stream on a terminal, otherwise a line now and then.

    Call it with the progress of the run inside a `with` block. Everything is drawn by the calling thread.
    """

    def __init__(self) -> None:
        self._progress = RunProgress((), Latency())
        self._started = self._shown = time.monotonic()
        self._live = LiveTable(COLUMNS) if console.is_terminal else None

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            if self._progress.streams:
                self._live.update(self._rows())
            self._live.stop()

    def __call__(self, progress: RunProgress) -> None:
        now = time.monotonic()
        if not self._progress.streams:  # the first call: the streams are open now
            self._started = self._shown = now
        self._progress = progress
        if now - self._shown < (PLAIN_SECONDS if self._live is None else LIVE_SECONDS):
            return
        self._shown = now
        if self._live is None:
            log(self._line(now))
        else:
            self._live.update(self._rows())

    def summarise(self, report: RunReport) -> None:
        """Print the summary of a run that has ended."""
        streams = self._progress.streams
        if len(streams) > 1:
            table("", [*COLUMNS[:-1], "ended by"], [_row(stream) for stream in streams])
            _latencies({"step": report.streams[0].step})
        for stream, result in zip(streams, report.streams, strict=True):
            prefix = self._prefix(stream)
            if result.frames and len(streams) == 1:
                parts = {part: getattr(result, part) for part in ("decode", "convert", "step", "encode", "latency")}
                _latencies(parts)
            _log_counts(f"{prefix}resets", result.resets)
            _log_counts(f"{prefix}dropped", result.dropped)
            _log_counts(f"{prefix}bad events", result.bad_events)
            _log_counts(f"{prefix}server", result.server_events)
            _log_counts(f"{prefix}counted", {"late": result.late, "reconnects": result.reconnects})
            if not result.frames:
                continue
            width, height = result.frame_size or (0, 0)
            ending = {"interrupted": ", stopped by a signal", "error": ", failed"}.get(result.stopped, "")
            rate = f"{result.frames} frames of {width}x{height}, {result.frames_per_second:.1f} frames/s"
            stage("run", result.output or "no output", result.seconds, rate + ending)

    def _prefix(self, stream: StreamProgress) -> str:
        return f"{stream.name}: " if len(self._progress.streams) > 1 else ""

    def _line(self, now: float) -> str:
        streams = self._progress.streams
        done = [f"{self._prefix(stream)}{_frames(stream)} frames{_losses(stream)}" for stream in streams]
        rate = sum(stream.frames for stream in streams) / (now - self._started)
        return f"{', '.join(done)}, {rate:.1f} frames/s, {(self._progress.step.mean or 0) * 1e3:.2f} ms/step"

    def _rows(self) -> list[list[str]]:
        return [_row(stream) for stream in self._progress.streams]


def _row(stream: StreamProgress) -> list[str]:
    seconds = stream.seconds
    times = (stream.latency.percentile(q) for q in (50, 95, 99))
    return [
        stream.name,
        _frames(stream),
        f"{stream.frames / seconds if seconds else 0.0:.1f}",
        *("" if each is None else f"{each * 1e3:.1f}" for each in times),
        f"{stream.queued['input']}+{stream.queued['output']}",
        str(sum(stream.dropped.values())),
        str(sum(stream.resets.values())),
        str(stream.reconnects),
        stream.stopped or "",
    ]


def _frames(stream: StreamProgress) -> str:
    return str(stream.frames) if stream.total is None else f"{stream.frames} of {stream.total}"


def _losses(stream: StreamProgress) -> str:
    dropped = sum(stream.dropped.values())
    return f" ({dropped} dropped)" if dropped else ""


def _latencies(parts: Mapping[str, LatencySummary]) -> None:
    rows = []
    for part, times in parts.items():
        if times.first_ms is not None:
            figures = (times.mean_ms, times.p50_ms, times.p90_ms, times.p95_ms, times.p99_ms, times.max_ms)
            rows.append([part, f"{times.first_ms:.2f}", *("" if f is None else f"{f:.2f}" for f in figures)])
    table("", ["ms per frame", "first", "mean", "p50", "p90", "p95", "p99", "max"], rows)


def _log_counts(title: str, counts: Mapping[Any, int]) -> None:
    """Log the counts that are not zero."""
    text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if text:
        log(f"{title}: {text}")
