"""Report of one stream, from its counters."""

from __future__ import annotations

from stepcell.display import displayed
from stepcell.runtime.media.source import display_name
from stepcell.runtime.streams.report import StreamReport
from stepcell.runtime.streams.run_snapshots import SnapshotWriter
from stepcell.runtime.streams.stepper import Stepper
from stepcell.runtime.streams.stream import Stream

__all__ = ["stream_report"]


def stream_report(stream: Stream, stepper: Stepper, snapshots: SnapshotWriter | None) -> StreamReport:
    """The report of a stream that is closed."""
    seconds, size, output = stream.seconds, stream.size, stream.output
    failure = displayed(stream.failure.message) if stream.failure else output.unfinished
    return StreamReport(
        model=display_name(stepper.name),
        backend=stepper.description,
        device=stepper.device,
        input=stream.input,
        output=display_name(output.sink.name) if output.sink else None,
        output_tensor=output.tensor,
        frame_size=size and (size[1], size[0]),
        first_frame=stream.start,
        frames=stream.frames,
        written=output.written,
        dropped=stream.dropped,
        late=stream.late,
        resets=stream.resets,
        non_finite=stream.non_finite,
        bad_events=stream.bad_events,
        reconnects=stream.reconnects,
        server_events=dict(stream.server_events),
        snapshots=snapshots.written if snapshots else 0,
        failed_snapshots=snapshots.failed if snapshots else 0,
        resumes_at=snapshots.positions.get(stream.name) if snapshots else None,
        stopped=stream.stopped or "error",
        error=failure,
        seconds=round(seconds, 3),
        frames_per_second=round(stream.frames / seconds, 2) if seconds else 0.0,
        latency=stream.latency.summary(),
        step=stepper.latency.summary(),
        decode=stream.decode.summary(),
        convert=output.convert.summary(),
        encode=output.encode.summary(),
    )
