"""What `stepcell run` shows of its streams while they run, and when they have ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from stepcell.cli.console import console, log, stage, table
from stepcell.runtime.loop.latency import Latency, LatencySummary
from stepcell.runtime.streams.report import RunReport
from stepcell.runtime.streams.stream import Lane

__all__ = ["View", "summarise"]

LIVE_SECONDS = 0.2  # between two pictures on a terminal
PLAIN_SECONDS = 5.0  # between two lines elsewhere
COLUMNS = ("stream", "frames", "frames/s", "p50 ms", "p95 ms", "p99 ms", "queue", "dropped", "resets", "lost", "")


class View:
    """One row for each stream on a terminal, one line now and then elsewhere.

    All figures are taken by the thread that steps; nothing is drawn by another.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes
        self._started = self._shown = time.monotonic()
        self._steps = Latency()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def step(self, seconds: float) -> None:
        self._steps.add(seconds)

    def frame(self, lane: Lane, seconds: float) -> None:
        pass

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._shown < (PLAIN_SECONDS if self._live is None else LIVE_SECONDS):
            return
        self._shown = now
        if self._live is None:
            log(self._line(now))
        else:
            self._live.update(self._table(), refresh=True)

    def _line(self, now: float) -> str:
        done = [f"{lane.prefix}{_progress(lane)} frames{_losses(lane)}" for lane in self._lanes]
        rate = sum(lane.frames for lane in self._lanes) / (now - self._started)
        return f"{', '.join(done)}, {rate:.1f} frames/s, {(self._steps.mean or 0) * 1e3:.2f} ms/step"

    def _table(self) -> Table:
        grid = Table(box=None, pad_edge=False)
        grid.add_column(COLUMNS[0], overflow="ellipsis", no_wrap=True, max_width=40)
        for column in COLUMNS[1:]:
            grid.add_column(column, justify="right", no_wrap=True)
        for lane in self._lanes:
            grid.add_row(*map(Text, _row(lane)))
        return grid


def _row(lane: Lane) -> list[str]:
    seconds = (lane.ended or time.perf_counter()) - (lane.started or time.perf_counter())
    times = (lane.latency.percentile(q) for q in (50, 95, 99))
    return [
        lane.name,
        _progress(lane),
        f"{lane.frames / seconds if seconds else 0.0:.1f}",
        *("" if each is None else f"{each * 1e3:.1f}" for each in times),
        f"{lane.queued['input']}+{lane.queued['output']}",
        str(sum(lane.dropped.values())),
        str(sum(lane.resets.values())),
        str(lane.reconnects),
        lane.stopped or "",
    ]


def _progress(lane: Lane) -> str:
    left = None if lane.length is None else max(0, lane.length - lane.start)
    total = min((each for each in (left, lane.limit) if each is not None), default=None)
    return str(lane.frames) if total is None else f"{lane.frames} of {total}"


def _losses(lane: Lane) -> str:
    dropped = sum(lane.dropped.values())
    return f" ({dropped} dropped)" if dropped else ""


def summarise(lanes: Sequence[Lane], reports: Sequence[RunReport]) -> None:
    """The last words of a run, for a person."""
    if len(lanes) > 1:
        table("", [*COLUMNS[:-1], "ended by"], [_row(lane) for lane in lanes])
        _latencies({"step": reports[0].step})
    for lane, report in zip(lanes, reports, strict=True):
        if report.frames and len(lanes) == 1:
            parts = {part: getattr(report, part) for part in ("decode", "convert", "step", "encode", "latency")}
            _latencies(parts)
        _say(f"{lane.prefix}resets", report.resets)
        _say(f"{lane.prefix}dropped", report.dropped)
        _say(f"{lane.prefix}counted", {"late": report.late, "reconnects": report.reconnects})
        if not report.frames:
            continue
        width, height = report.frame_size or (0, 0)
        ending = {"interrupted": ", stopped by a signal", "error": ", broken off"}.get(report.stopped, "")
        rate = f"{report.frames} frames of {width}x{height}, {report.frames_per_second:.1f} frames/s"
        stage("run", report.output or "no output", report.seconds, rate + ending)


def _latencies(parts: Mapping[str, LatencySummary]) -> None:
    rows = []
    for part, times in parts.items():
        if times.first_ms is not None:
            figures = (times.mean_ms, times.p50_ms, times.p90_ms, times.p95_ms, times.p99_ms, times.max_ms)
            rows.append([part, f"{times.first_ms:.2f}", *("" if f is None else f"{f:.2f}" for f in figures)])
    table("", ["ms per frame", "first", "mean", "p50", "p90", "p95", "p99", "max"], rows)


def _say(title: str, counts: Mapping[Any, int]) -> None:
    """What is not zero."""
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if said:
        log(f"{title}: {said}")
