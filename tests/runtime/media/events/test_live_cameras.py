"""Cameras through their drivers: a DV server that speaks the protocol, and a stand-in for USB cameras."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import InputError, MissingDependencyError, UsageError
from stepcell.event_spec import EventSpec, EventWindow
from stepcell.runtime.media.events import Events, event_tensor, live_cameras
from stepcell.runtime.media.open_source import open_source

SIZE = (48, 32)
SPEC = EventSpec(representation="voxel_grid", bins=2, window=EventWindow.parse("10ms"))
START = 1_700_000_000_000_000

# Serves 5 batches of 1000 events, 10 us apart, to its first client, then ends.
SERVER = f"""
import sys, time, dv_processing as dv
stream = dv.io.Stream.EventStream(0, "events", "stand-in", {SIZE})
for port in range(int(sys.argv[1]), int(sys.argv[1]) + 50):
    try:
        server = dv.io.NetworkWriter("127.0.0.1", port, stream)
        break
    except RuntimeError:
        pass
print(port, flush=True)
while server.getClientCount() == 0:
    time.sleep(0.01)
for number in range(0, 5000, 1000):
    events = dv.EventStore()
    for k in range(number, number + 1000):
        events.push_back({START} + 10 * k, k % 48, k % 32, k % 3 == 0)
    server.writeEvents(events)
sys.stdin.read()
"""


def all_events() -> Events:
    k = np.arange(5000)
    return Events.of(k % 48, k % 32, k % 3 == 0, START + 10 * k)


@contextlib.contextmanager
def dv_server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    pytest.importorskip("dv_processing")
    command = [sys.executable, "-c", SERVER, "23100"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        yield f"dv://localhost:{int(server.stdout.readline())}", server
        if server.poll() is None:
            server.stdin.close()


def assert_windows(frames: list[NDArray[np.float32]]) -> None:
    events = all_events()
    for number, frame in enumerate(frames):
        part = events[1000 * number : 1000 * (number + 1)]
        assert np.array_equal(frame, event_tensor(part, SPEC, SIZE[1], SIZE[0]))


def test_a_dv_server() -> None:
    with dv_server() as (address, server):
        source = open_source(address, events=SPEC)
        assert source.live
        frames = iter(source)
        assert_windows(list(itertools.islice(frames, 4)))
        assert server.stdin is not None
        server.stdin.close()
        server.wait()
        last, *_ = frames  # and empty ones, if silence came before the end
        assert_windows([*[event_tensor(all_events()[k : k + 1000], SPEC, 32, 48) for k in range(0, 4000, 1000)], last])
        source.close()
    with pytest.raises(InputError, match="cannot be opened"):
        open_source(address, events=SPEC)


class Camera:
    """A USB camera as neuromorphic-drivers presents it: `None` for a packet where nothing came in time."""

    def __init__(self) -> None:
        events = all_events()
        records = np.empty(len(events), [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("on", "?")])
        for name, column in (("t", events.t), ("x", events.x), ("y", events.y), ("on", events.p)):
            records[name] = column
        lost = [np.array([0], np.uint64), None, np.array([0, 5], np.uint64)]
        packets = [
            SimpleNamespace(polarity_events=part, polarity_events_overflow_indices=overflow)
            for part, overflow in zip(np.array_split(records, 3), lost, strict=True)
        ]
        nothing = SimpleNamespace(polarity_events=None, polarity_events_overflow_indices=None)
        self._packets = iter([None, packets[0], None, nothing, packets[1], packets[2]])
        self.closed = False

    def properties(self) -> SimpleNamespace:
        return SimpleNamespace(width=SIZE[0], height=SIZE[1])

    def __next__(self) -> tuple[object, object]:
        return object(), next(self._packets)

    def close(self) -> None:
        self.closed = True


def test_a_usb_camera(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    camera, asked = Camera(), []

    def opened(**options: Any) -> Camera:
        asked.append(options)
        return camera

    monkeypatch.setattr(live_cameras, "require", lambda *_, **__: SimpleNamespace(open=opened))
    source = open_source("neuromorphic://00050423", events=SPEC)
    assert asked == [{"serial": "00050423", "iterator_timeout": live_cameras.WAIT_SECONDS}]
    frames = list(source)
    source.close()
    assert len(frames) == 5
    assert_windows(frames)
    assert camera.closed
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "events were lost: they came faster than they were read",
        "events were lost 3 times",
    ]


def test_without_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neuromorphic_drivers", None)
    monkeypatch.setitem(sys.modules, "dv_processing", None)
    for address, extra in (("dv://127.0.0.1:9", "dv"), ("neuromorphic://", "neuromorphic")):
        with pytest.raises(MissingDependencyError) as error:
            open_source(address, events=SPEC)
        assert error.value.hint == f"pip install 'stepcell[{extra}]'"
    with pytest.raises(UsageError, match="expected dv://HOST:PORT"):
        open_source("dv://127.0.0.1", events=SPEC)


def test_a_refused_connection_is_told_without_the_lines_of_a_library() -> None:
    pytest.importorskip("dv_processing")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        address = f"dv://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(InputError, match=r"cannot be opened \(connect: Connection refused\)$"):
            open_source(address, events=SPEC)
