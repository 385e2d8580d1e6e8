"""Streams through a step loop: read, scale, step, unscale, write; and a report at the end.

Reading and writing have threads of their own, one each per stream; the loop is stepped here. One
stream has the loop to itself. Several are slots of one batch: each step takes the frames that are
there, so a stream that is slow, lost or at its end holds up no other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from stepcell.errors import StepcellError
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.media.sinks import Sink
from stepcell.runtime.media.sources import Source
from stepcell.runtime.streams.report import RunReport, StreamError
from stepcell.runtime.streams.reset_policy import ResetWatch
from stepcell.runtime.streams.scheduler import Scheduler, Watcher
from stepcell.runtime.streams.shutdown import StopRequest
from stepcell.runtime.streams.snapshot_writer import SnapshotWriter
from stepcell.runtime.streams.stream import Lane

__all__ = ["run_stream", "run_streams"]


def run_stream(
    loop: StepLoop,
    source: Source,
    sink: Sink | None = None,
    *,
    resets: ResetWatch | None = None,
    snapshots: SnapshotWriter | None = None,
    start: int = 0,
    limit: int | None = None,
    stop: StopRequest | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> RunReport:
    """Step every frame of `source` and write the results to `sink`: `run_streams` of one.

    Args:
        on_frame: called with the number of frames done after each.

    Raises:
        StreamError: a frame could not be read, stepped or written; with the report so far.
        KeyboardInterrupt: ctrl-C where `stop` did not listen; the sink is closed all the same.
    """
    lane = Lane(source, sink, resets=resets, start=start, limit=limit)
    watchers = [] if on_frame is None else [_Counting(on_frame)]
    (report,) = run_streams(loop, [lane], snapshots=snapshots, stop=stop, watchers=watchers)
    if lane.failure is not None:
        raise StreamError(lane.failure, report) from lane.failure
    return report


def run_streams(
    loop: StepLoop,
    lanes: Sequence[Lane],
    *,
    snapshots: SnapshotWriter | None = None,
    stop: StopRequest | None = None,
    watchers: Sequence[Watcher] = (),
) -> list[RunReport]:
    """Step all streams until the last one has ended, each in a slot where there are several.

    However a stream ends, what was written is finished as a valid file and kept, and the others go
    on; where nothing was written, a file that was there before is left alone. A snapshot that
    cannot be written is logged and counted, and the streams go on.

    Args:
        loop: a model with one picture or event input; opened with a slot for each stream, without
            slots for one. A slot that is attached under a stream's name goes on with its states;
            so does a loop without slots whose stream has a `start`. All else starts afresh.
        lanes: the streams; one whose `failure` is set afterwards broke. A device that fails, or a
            model that takes neither pictures nor events, breaks all of them.
        snapshots: writes the states now and then, and at the end unless everything broke.
        stop: asked before every step; a stopped run returns its reports. Outputs that are being
            finished when a further signal comes are left behind.
        watchers: told of every step and frame.

    Returns:
        A report for each stream, in the same order.

    Raises:
        KeyboardInterrupt: ctrl-C where `stop` did not listen; the sinks are closed all the same.
    """
    run = Scheduler(loop, lanes, snapshots, stop or StopRequest(), watchers)
    try:
        run.go()
    except StepcellError as error:  # of the loop, and with it of every stream
        run.end("error", error)
    except KeyboardInterrupt:
        if run.stop.signal is None:
            raise
    finally:
        run.end("interrupted")
        with contextlib.ExitStack() as closing:  # each of them, whatever another one raises
            for lane in reversed(lanes):
                closing.callback(lane.close, run.stop)
    if snapshots is not None and run.steps and run.between_steps and not all(lane.failure for lane in lanes):
        run.save(snapshots)
    return [lane.report(loop, snapshots) for lane in lanes]


class _Counting:
    """Tells a function how many frames are done."""

    def __init__(self, on_frame: Callable[[int], None]) -> None:
        self._on_frame = on_frame

    def step(self, seconds: float) -> None:
        pass

    def frame(self, lane: Lane, seconds: float) -> None:
        self._on_frame(lane.frames)

    def tick(self) -> None:
        pass
