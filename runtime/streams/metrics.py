"""What a run counts, served over HTTP for Prometheus.

Counters are read from the streams when they are asked for, so they are those of the report, and a
run that nobody asks costs nothing. Only the two histograms are counted as the run goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

from stepcell.errors import OutputError, UsageError
from stepcell.missing import require
from stepcell.runtime.streams.report import Dropped
from stepcell.runtime.streams.reset_policy import Cause

__all__ = ["LOCALHOST", "Counted", "Metrics", "parse_address"]

LOCALHOST = "127.0.0.1"
# Seconds: from a small model on a GPU to one that is too slow for any camera.
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.033, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Counted(Protocol):
    """What one stream counts; all of it is read from another thread while the stream runs."""

    @property
    def name(self) -> str: ...
    @property
    def frames(self) -> int: ...
    @property
    def late(self) -> int: ...
    @property
    def dropped(self) -> Dropped: ...
    @property
    def resets(self) -> dict[Cause, int]: ...
    @property
    def non_finite(self) -> int: ...
    @property
    def reconnects(self) -> int: ...
    @property
    def queued(self) -> dict[str, int]: ...
    @property
    def running(self) -> bool: ...


class Metrics:
    """Serves `/metrics` until it is closed; best in a `with` statement.

    Args:
        streams: what is counted.
        address, port: where; port 0 takes a free one, which is then in `port`.

    Raises:
        OutputError: the port cannot be listened on.
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self, streams: Sequence[Counted], port: int, address: str = LOCALHOST) -> None:
        client = require("prometheus_client", extra="metrics", purpose="serving metrics")
        core = require("prometheus_client.core", extra="metrics", purpose="serving metrics")
        self._core, self._streams = core, streams
        registry = client.CollectorRegistry()
        client.ProcessCollector(registry=registry)  # resident memory, processor time, open files
        self._step = client.Histogram(
            "stepcell_step_seconds", "Time of one step of the batch.", buckets=BUCKETS, registry=registry
        )
        self._latency = client.Histogram(
            "stepcell_frame_seconds",
            "From a frame's arrival until its result was handed to the output.",
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
        self.address, self.port = address, int(self._server.server_port)

    def step(self, seconds: float) -> None:
        """Count the time of one step."""
        self._step.observe(seconds)

    def frame(self, stream: Counted, seconds: float) -> None:
        """Count how long one frame took through the whole run."""
        self._latency.labels(stream.name).observe(seconds)

    def tick(self) -> None:
        """Nothing: counters are read when they are asked for."""

    def collect(self) -> Iterator[Any]:
        """The counters as they are now; called by prometheus-client."""
        yield self._family("counter", "frames", "Frames stepped.", ((s.name, s.frames) for s in self._streams))
        late = ((s.name, s.late) for s in self._streams)
        yield self._family("counter", "late_frames", "Frames older than the deadline.", late)
        found = ((s.name, s.non_finite) for s in self._streams)
        yield self._family("counter", "non_finite", "Frames at which NaN or Inf was seen.", found)
        back = ((s.name, s.reconnects) for s in self._streams)
        yield self._family("counter", "reconnects", "Times the input was lost and came back.", back)
        up = ((s.name, int(s.running)) for s in self._streams)
        yield self._family("gauge", "stream_up", "1 while the stream runs.", up)
        dropped = [(s.name, s.dropped) for s in self._streams]
        yield self._split("counter", "dropped_frames", "Frames that were not stepped.", "reason", dropped)
        resets = [(s.name, s.resets) for s in self._streams]
        yield self._split("counter", "resets", "Times the past was forgotten.", "cause", resets)
        queued = [(s.name, s.queued) for s in self._streams]
        yield self._split("gauge", "queued_frames", "Frames that wait.", "queue", queued)

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _family(self, kind: str, name: str, text: str, values: Iterable[tuple[str, int]]) -> Any:
        family = self._new(kind, name, text, ["stream"])
        for stream, value in values:
            family.add_metric([stream], value)
        return family

    def _split(self, kind: str, name: str, text: str, label: str, values: Iterable[tuple[str, Any]]) -> Any:
        """A family with a second label."""
        family = self._new(kind, name, text, ["stream", label])
        for stream, counts in values:
            for key, value in counts.items():
                family.add_metric([stream, key], value)
        return family

    def _new(self, kind: str, name: str, text: str, labels: list[str]) -> Any:
        families = {"counter": self._core.CounterMetricFamily, "gauge": self._core.GaugeMetricFamily}
        return families[kind](f"stepcell_{name}", text, labels=labels)


def parse_address(text: str) -> tuple[str, int]:
    """`9095` or `0.0.0.0:9095` as address and port; by default only this machine is answered.

    Raises:
        UsageError: another form.
    """
    address, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise UsageError(f"--metrics-port: expected [ADDRESS:]PORT, got {text!r}", hint="such as 9095")
    return address.strip("[]") or LOCALHOST, int(port)
