"""Metrics: serves the counters of a run over HTTP for Prometheus.

Counters are read from the streams when they are scraped, so they agree with the report and cost nothing otherwise.
Only the two histograms are updated during the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from stepcell.errors import OutputError
from stepcell.optional_imports import require
from stepcell.runtime.streams.progress import StreamProgress

__all__ = ["LOCALHOST", "Metrics"]

LOCALHOST = "127.0.0.1"
# Seconds: from a small model on a GPU to one that is too slow for any camera.
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.033, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

# Kind, name, description, attribute of StreamProgress, and the second label of an attribute with several values.
_FAMILIES = (
    ("counter", "frames", "Frames stepped.", "frames", None),
    ("counter", "late_frames", "Late frames that were stepped.", "late", None),
    ("counter", "non_finite", "Frames after which NaN or Inf was found.", "non_finite", None),
    ("counter", "reconnects", "Times the input was lost and reopened.", "reconnects", None),
    ("gauge", "stream_up", "1 while the stream runs.", "running", None),
    ("counter", "dropped_frames", "Frames that were not stepped.", "dropped", "reason"),
    ("counter", "bad_events", "Events outside the sensor or earlier than the one before.", "bad_events", "kind"),
    ("counter", "resets", "Resets of the states.", "resets", "cause"),
    ("counter", "server_events", "What the stream survived on its server.", "server_events", "kind"),
    ("gauge", "queued_frames", "Frames waiting in a queue.", "queued", "queue"),
)


class Metrics:
    """An HTTP server of `/metrics`, from construction until `close`; use it in a `with` statement.

    Args:
        port: to listen on; 0 takes a free one.
        address: to listen on; by default only this machine is answered.

    Attributes:
        address, port: the ones in use.

    Raises:
        OutputError: the port cannot be listened on.
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self, port: int, address: str = LOCALHOST) -> None:
        client = require("prometheus_client", extra="metrics", purpose="serving metrics")
        self._core = require("prometheus_client.core", extra="metrics", purpose="serving metrics")
        self._streams: Sequence[StreamProgress] = ()
        registry = client.CollectorRegistry()
        client.ProcessCollector(registry=registry)  # resident memory, processor time, open files
        self._step = client.Histogram(
            "stepcell_step_seconds", "Time of one step of the batch.", buckets=BUCKETS, registry=registry
        )
        self._latency = client.Histogram(
            "stepcell_frame_seconds",
            "From the arrival of a frame until its result was queued for the output.",
            ["stream"],
            buckets=BUCKETS,
            registry=registry,
        )
        registry.register(self)
        try:
            self._server, self._thread = client.start_http_server(port, address, registry)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"metrics: cannot listen on {address}:{port} ({reason})") from error
        self.address: str = address
        self.port: int = int(self._server.server_port)

    def watch(self, streams: Sequence[StreamProgress]) -> None:
        """Serve the counters of these streams from now on; called by the run."""
        self._streams = streams

    def step(self, seconds: float) -> None:
        """Add the time of one step."""
        self._step.observe(seconds)

    def frame(self, stream: StreamProgress, seconds: float) -> None:
        """Add the latency of one frame."""
        self._latency.labels(stream.name).observe(seconds)

    def collect(self) -> Iterator[Any]:
        """The current counters; called by prometheus-client."""
        families = {"counter": self._core.CounterMetricFamily, "gauge": self._core.GaugeMetricFamily}
        for kind, name, text, attribute, label in _FAMILIES:
            labels = ["stream"] if label is None else ["stream", label]
            family = families[kind](f"stepcell_{name}", text, labels=labels)
            for stream in self._streams:
                value = getattr(stream, attribute)
                for key, count in ({None: value} if label is None else value).items():
                    family.add_metric([stream.name] if key is None else [stream.name, key], int(count))
            yield family

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
