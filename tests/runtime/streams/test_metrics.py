"""Metrics: the text that Prometheus scrapes."""

from __future__ import annotations

import socket
import urllib.request
from dataclasses import dataclass, field

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stepcell.errors import OutputError, StepcellError
from stepcell.runtime.media.source import BadEventCounts
from stepcell.runtime.streams.metrics import Metrics
from stepcell.runtime.streams.report import Dropped
from stepcell.runtime.streams.reset_policy import Cause


@dataclass
class Counts:
    name: str
    frames: int = 0
    late: int = 0
    dropped: Dropped = field(default_factory=lambda: {"late": 0, "queue full": 0})
    resets: dict[Cause, int] = field(default_factory=lambda: {"gap": 0, "cut": 0})
    non_finite: int = 0
    bad_events: BadEventCounts = field(default_factory=lambda: {"outside": 0, "back in time": 0})
    reconnects: int = 0
    server_events: dict[str, int] = field(default_factory=lambda: {"unreachable": 0, "resumed": 0})
    queued: dict[str, int] = field(default_factory=lambda: {"input": 0, "output": 0})
    running: bool = True


def scrape(metrics: Metrics) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    # Name, stream if there is one, second label.
    return {
        (
            sample.name,
            *(sample.labels[key] for key in sorted(sample.labels, key=lambda key: key != "stream")),
        ): sample.value
        for sample in samples
    }


def test_counters_are_those_of_the_streams_at_that_moment() -> None:
    # A name may contain quotes, backslashes and line breaks.
    a, b = Counts("camera:0"), Counts('b "quoted" \\ \n.mp4')
    with Metrics(0) as metrics:
        metrics.watch([a, b])
        assert scrape(metrics)["stepcell_frames_total", "camera:0"] == 0
        a.frames, a.late, a.non_finite, a.reconnects, a.running = 7, 2, 3, 4, False
        a.server_events["resumed"] = 6
        a.bad_events["back in time"], a.dropped["queue full"], a.resets["gap"], b.resets["cut"], b.queued["output"] = (
            2,
            5,
            6,
            8,
            9,
        )
        found = scrape(metrics)
    assert found["stepcell_frames_total", "camera:0"] == 7
    assert found["stepcell_frames_total", b.name] == 0
    assert found["stepcell_late_frames_total", "camera:0"] == 2
    assert found["stepcell_non_finite_total", "camera:0"] == 3
    assert found["stepcell_reconnects_total", "camera:0"] == 4
    assert found["stepcell_server_events_total", "camera:0", "resumed"] == 6
    assert (found["stepcell_stream_up", "camera:0"], found["stepcell_stream_up", b.name]) == (0, 1)
    assert found["stepcell_dropped_frames_total", "camera:0", "queue full"] == 5
    assert found["stepcell_bad_events_total", "camera:0", "back in time"] == 2
    assert found["stepcell_dropped_frames_total", "camera:0", "late"] == 0
    assert found["stepcell_resets_total", "camera:0", "gap"] == 6
    assert found["stepcell_resets_total", b.name, "cut"] == 8
    assert found["stepcell_queued_frames", b.name, "output"] == 9
    assert found["process_resident_memory_bytes",] > 1e6


def test_histograms_count_every_step() -> None:
    stream = Counts("a")
    with Metrics(0) as metrics:
        metrics.watch([stream])
        for seconds in (0.0005, 0.004, 0.004, 30.0):
            metrics.step(seconds)
            metrics.frame(stream, seconds * 2)
        found = scrape(metrics)
    assert found["stepcell_step_seconds_bucket", "0.001"] == 1
    assert found["stepcell_step_seconds_bucket", "0.005"] == 3
    assert found["stepcell_step_seconds_bucket", "5.0"] == 3
    assert found["stepcell_step_seconds_count",] == found["stepcell_step_seconds_bucket", "+Inf"] == 4
    assert found["stepcell_step_seconds_sum",] == pytest.approx(30.0085)
    assert found["stepcell_frame_seconds_bucket", "a", "0.01"] == 3
    assert found["stepcell_frame_seconds_count", "a"] == 4


def test_only_this_machine_is_answered_and_the_port_is_free_afterwards() -> None:
    with Metrics(0) as metrics:
        port = metrics.port
        assert metrics.address == "127.0.0.1"
        with pytest.raises(OutputError, match=f"cannot listen on 127.0.0.1:{port} "):
            Metrics(port)
    with socket.create_server(("127.0.0.1", port)):
        pass
    with pytest.raises(StepcellError, match=r"cannot listen on no\.such\.host\.invalid"):
        Metrics(0, "no.such.host.invalid")
