"""Events over stdin, named pipes and TCP: equal to those of the file, in silence too, and what is no stream."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from stepcell.cli import main
from stepcell.errors import InputError, UsageError
from stepcell.event_spec import EventSpec, EventWindow
from stepcell.runtime.media.events import Events, EventSource, stream_clock, write_dat
from stepcell.runtime.media.events.byte_stream import open_byte_stream
from stepcell.runtime.media.events.stream_clock import StreamClock
from stepcell.runtime.media.events.windows import split_windows
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.source import Source
from stepcell.runtime.streams.frame_reader import FrameReader
from tests.runtime.media.events.files import encode_evt2, encode_evt3, write_raw

SIZE = (48, 32)
HEADER = ("geometry 48x32", "end")


def some_events(count: int = 5000, start: int = 1000, span: int = 250_000) -> Events:
    rng = np.random.default_rng(0)
    t = start + np.sort(rng.integers(0, span, count))
    return Events.of(rng.integers(0, SIZE[0], count), rng.integers(0, SIZE[1], count), rng.integers(0, 2, count), t)


def spec(window: str = "10ms") -> EventSpec:
    return EventSpec(representation="voxel_grid", bins=2, window=EventWindow.parse(window))


def recording(folder: Path, kind: str) -> Path:
    events = some_events()
    if kind == "dat":
        write_dat(folder / "e.dat", [events], SIZE)
        return folder / "e.dat"
    words = encode_evt2(events) if kind == "2.0" else encode_evt3(events)
    return write_raw(folder / "e.raw", words, f"evt {kind}", "geometry 48x32")


def send(pipe: Path, data: bytes, seed: int = 0) -> threading.Thread:
    """Write a pipe in pieces of any length."""

    def write() -> None:
        rng = np.random.default_rng(seed)
        with pipe.open("wb", buffering=0) as file:
            at = 0
            while at < len(data):
                size = int(rng.integers(1, 4000))
                file.write(data[at : at + size])
                at += size

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@contextlib.contextmanager
def served(*answers: bytes) -> Iterator[str]:
    """The address of a server that sends each answer to one client, then ends the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answer in answers:
                with contextlib.suppress(OSError):
                    client, _ = server.accept()
                    with client:
                        client.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


def frames_of(source: Source) -> np.ndarray:
    with contextlib.closing(source):
        return np.stack(list(source))


@pytest.mark.parametrize("window", ["10ms", "300events"])
@pytest.mark.parametrize("kind", ["dat", "2.0", "3.0"])
def test_a_pipe_and_a_connection_give_what_the_file_gives(kind: str, window: str, pipe: Path, tmp_path: Path) -> None:
    path = recording(tmp_path, kind)
    wanted = frames_of(open_source(str(path), events=spec(window)))
    source = open_source(str(pipe), events=spec(window))
    assert source.live
    assert source.fps == (100 if window == "10ms" else None)
    send(pipe, path.read_bytes())
    assert np.array_equal(frames_of(source), wanted)
    with served(path.read_bytes()) as address:
        source = open_source(address, events=spec(window))
        assert source.name == address
        assert np.array_equal(frames_of(source), wanted)


def test_stdin(firenet_onnx: Path, tmp_path: Path) -> None:
    path = recording(tmp_path, "3.0")
    command = [sys.executable, "-m", "stepcell", "run", str(firenet_onnx), "--event-window", "10ms", "--json"]
    with path.open("rb") as file:
        piped = subprocess.run(
            [*command, "-i", "-", "-o", str(tmp_path / "a.npy")], input=file.read(), capture_output=True
        )
    assert piped.returncode == 0, piped.stderr
    report = json.loads(piped.stdout)
    assert (report["input"], report["frames"]) == ("stdin", 25)
    result = CliRunner().invoke(main, [*command[3:-1], "-i", str(path), "-o", str(tmp_path / "b.npy")])
    assert result.exit_code == 0
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


def test_a_lost_connection_is_made_again(firenet_onnx: Path, tmp_path: Path) -> None:
    data = recording(tmp_path, "dat").read_bytes()
    with served(data, data) as address:
        command = [
            "run",
            str(firenet_onnx),
            "--event-window",
            "10ms",
            "-i",
            address,
            "--reconnect",
            "60",
            "--limit",
            "40",
        ]
        result = CliRunner().invoke(main, [*command, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["frames"], report["reconnects"]) == (40, 1)


def test_a_bad_event_ends_the_stream_even_if_it_could_be_opened_again(firenet_onnx: Path, tmp_path: Path) -> None:
    events = some_events()
    t = events.t.copy()
    t[4000] = 0
    write_dat(tmp_path / "e.dat", [Events(events.x, events.y, events.p, t)], SIZE)
    data = (tmp_path / "e.dat").read_bytes()
    with served(data, data) as address:
        command = ["run", str(firenet_onnx), "--event-window", "10ms", "-i", address, "--reconnect", "inf"]
        result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "out.npy")])
    assert result.exit_code == 1
    assert "event 4000 at" in " ".join(result.stderr.split())
    assert len(np.load(tmp_path / "out.npy")) == np.ceil((t[3999] - t[:1] + 1) / 10_000) - 1


@pytest.mark.parametrize("sent", ["nothing", "header", "events"])
def test_a_reader_that_waits_for_a_silent_sender_can_be_stopped(sent: str, pipe: Path, tmp_path: Path) -> None:
    data = recording(tmp_path, "dat").read_bytes()
    writer = os.open(pipe, os.O_RDWR)
    os.write(writer, {"nothing": b"", "header": data[:70], "events": data}[sent])
    reader = FrameReader(open_source(str(pipe), events=spec("1000000events")), threading.Condition())
    reader.stop()
    reader.join()
    os.close(writer)
    assert reader.ended


def test_a_pipe_where_a_file_is_needed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.raw")
    with pytest.raises(InputError, match="is a pipe, and a file is needed"):
        EventSource(tmp_path / "pipe.raw", spec())


def test_windows_go_on_in_silence(pipe: Path, tmp_path: Path) -> None:
    """Nothing is written after the first events, and the pipe stays open."""
    write_dat(tmp_path / "e.dat", [some_events(100, span=5000)], SIZE)
    source = open_source(str(pipe), events=spec())
    writer = os.open(pipe, os.O_RDWR)
    os.write(writer, (tmp_path / "e.dat").read_bytes())
    frames = iter(source)
    first, *others = itertools.islice(frames, 20)
    assert first.any()
    assert not np.any(others)
    late = some_events(100, start=40_000, span=1)  # of a window that is over: they count in the next one
    write_dat(tmp_path / "f.dat", [late], SIZE)
    os.write(writer, (tmp_path / "f.dat").read_bytes()[-800:])
    os.close(writer)
    assert sum(np.abs(frame).sum() > 0 for frame in frames) == 1
    source.close()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, in seconds, as the only element."""
    seconds = [100.0]
    monkeypatch.setattr(stream_clock.time, "monotonic", lambda: seconds[0])
    return seconds


def test_the_clock_goes_on_from_the_last_event(now: list[float]) -> None:
    clock = StreamClock("e")
    assert clock.now() is None
    parts = clock.watch([some_events(2, span=1), some_events(2, start=501_000, span=1)])
    next(parts)
    now[0] += 0.5
    next(parts)
    assert clock.now() is None
    now[0] += 1.2
    assert clock.now() == pytest.approx(501_000 + 1_000_000, abs=2)


def test_the_clock_of_a_camera_may_be_a_little_fast(now: list[float]) -> None:
    """By 100 parts in a million, as quartzes are: 3.6 seconds in ten hours."""
    clock = StreamClock("e")
    one = some_events(1, span=1)

    def parts() -> Iterator[Events]:
        for second in range(0, 36_000, 10):
            now[0] = 100.0 + second
            yield Events(one.x, one.y, one.p, np.array([int(second * 1_000_100)]))

    for part in clock.watch(parts()):
        last = int(part.t[-1])
    now[0] += 1.2
    assert clock.now() == pytest.approx(last + 1_000_000, abs=2)


@pytest.mark.parametrize("wait", [0.0, 9.0])
def test_a_recording_that_is_sent_as_it_is_read_has_no_silence(
    wait: float, now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Its events come faster or slower than they happened: a pause of the sender says nothing about the scene."""
    clock = StreamClock("e")
    parts = clock.watch([some_events(2, span=1), some_events(2, start=4_000_000, span=1)])
    next(parts)
    now[0] += wait
    next(parts)
    now[0] += 5
    with caplog.at_level("INFO"):
        assert [clock.now(), clock.now()] == [None, None]
    assert caplog.text.count(f"{'ahead of' if wait == 0 else 'behind'} the clock") == 1


def test_empty_windows_end_with_the_clock() -> None:
    events = some_events(10, start=0, span=1)
    nothing = events[:0]
    times = iter([None, 9_999, 30_000, 30_000])
    found = [
        (len(part), end)
        for part, end in split_windows(
            [events, nothing, nothing, nothing, nothing], spec().window, 1, lambda: next(times)
        )
    ]
    assert found == [(10, 10_000), (0, 20_000), (0, 30_000), (0, 40_000)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a Prophesee RAW or DAT file with its header, it is empty"),
        (bytes(range(8)), "it begins with 00 01 02"),
        (b"% evt 3.0\n% end\n", "does not state the size of its sensor"),
        (b"% evt 3.0\n% geometry 48x32\n% end\n", "contains no event"),
        (b"% evt 3.0\n% geometry 48x32\n% end\n\x00", "truncated: ends 1 bytes into a record of 2"),
        (b"% evt 4.0\n% geometry 48x32\n% end\n", "encoding 4.0"),
        (b"% Version 1\n% Width 48\n% Height 32\n\x0c\x08", "DAT version 1"),
    ],
)
def test_what_is_no_stream_of_events(data: bytes, message: str, pipe: Path) -> None:
    source = open_source(str(pipe), events=spec())
    send(pipe, data)
    with contextlib.closing(source), pytest.raises((InputError, UsageError), match=message):
        next(iter(source))


def test_a_sender_that_vanishes_is_asked_for() -> None:
    with served(b"") as address, contextlib.closing(open_byte_stream(address)) as stream:
        connection = socket.socket(fileno=os.dup(stream._descriptor))
        with connection:
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            assert [connection.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [10, 5, 3]


def test_addresses(tmp_path: Path) -> None:
    for text in ("tcp://", "tcp://host", "tcp://host:x", "tcp://host:99999", "tcp://host:9000/path"):
        with pytest.raises(UsageError, match="expected tcp://HOST:PORT"):
            open_source(text, events=spec())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(InputError, match="cannot be opened"):
        open_source(f"tcp://127.0.0.1:{port}", events=spec())
    with pytest.raises(UsageError, match="carries one stream"):
        open_source("-", events=spec(), event_stream="left")
    with pytest.raises(InputError, match="the model takes events"):
        open_source(str(tmp_path / "missing"), events=spec())
