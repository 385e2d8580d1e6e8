"""Frame writer: order, bounded queue, and errors."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import OutputError
from stepcell.models.zoo.clips import read_clip
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.streams.frame_writer import DEPTH, FrameWriter

FRAMES = read_clip("carphone_pristine")[:30]


class Gate:
    """A sink that blocks until released, and fails on demand."""

    name = "gate"
    takes_pixels = replaces = False

    def __init__(self, fails_at: int | None = None, fails_on: str = "write") -> None:
        self.open = threading.Semaphore(0)
        self.written: list[int] = []
        self.calls: list[str] = []
        self._fails_at, self._fails_on = fails_at, fails_on

    def write(self, frame: NDArray[Any]) -> None:
        self.open.acquire()
        if self._fails_on == "write" and len(self.written) == self._fails_at:
            raise OutputError("gate: cannot be written (No space left on device)")
        self.written.append(int(frame[0]))

    def close(self) -> None:
        self.calls.append("close")
        if self._fails_on == "close":
            raise OutputError("gate: cannot be written (No space left on device)")

    def salvage(self) -> int:
        self.calls.append("salvage")
        return len(self.written)

    def abandon(self) -> None:
        self.calls.append("abandon")


@pytest.mark.parametrize("name", ["out.npy", "out.mp4", "out"])
def test_what_is_written_is_what_a_sink_alone_writes(name: str, tmp_path: Path) -> None:
    alone = open_sink(str(tmp_path / f"alone-{name}"), Fraction(25))
    for frame in FRAMES:
        alone.write(frame)
    alone.close()
    writer = FrameWriter(open_sink(str(tmp_path / name), Fraction(25)), threading.Condition())
    for frame in FRAMES:
        writer.put(frame)
    writer.finish()
    writer.join()
    if name == "out.npy":
        np.testing.assert_array_equal(np.load(tmp_path / name), FRAMES)
    else:
        a, b = (np.stack(list(open_source(str(tmp_path / each)))) for each in (name, f"alone-{name}"))
        assert len(a) == len(FRAMES)
        if name == "out.mp4":
            # x264 reads uninitialised memory (MALLOC_PERTURB_ changes its file), so two files of the same frames may
            # differ; but every frame is there, in order.
            away = [[float(np.square(frame.astype(float) - other).mean()) for other in FRAMES] for frame in a]
            np.testing.assert_array_equal(np.argmin(away, axis=1), np.arange(len(FRAMES)))
            assert np.diagonal(away).max() < 40
        else:
            np.testing.assert_array_equal(a, b)
    assert writer.encode.summary().count == len(FRAMES) - 1
    assert not list(tmp_path.glob(".*"))


def test_the_queue_is_bounded_and_put_waits() -> None:
    gate, changed = Gate(), threading.Condition()
    writer = FrameWriter(gate, changed)
    for number in range(DEPTH + 1):  # the thread holds one
        with changed:
            assert changed.wait_for(lambda: writer.has_room, 5)
        writer.put(np.array([number]))
    with changed:
        assert changed.wait_for(lambda: writer.queued == DEPTH, 5)
    assert not writer.has_room
    waiting = threading.Thread(target=writer.put, args=(np.array([99]),))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    gate.open.release()
    waiting.join(5)
    assert not waiting.is_alive()
    assert writer.queued <= DEPTH
    gate.open.release(100)
    writer.finish()
    writer.join()
    assert gate.written == [*range(DEPTH + 1), 99]
    assert gate.calls == ["close"]


def test_finish_returns_at_once_and_wait_waits() -> None:
    gate = Gate()
    writer = FrameWriter(gate, threading.Condition())
    writer.put(np.array([7]))
    writer.finish()  # the gate is closed, so waiting would not end
    assert gate.calls == []
    gate.open.release()
    writer.join()
    assert (gate.written, gate.calls) == ([7], ["close"])


def test_abandon_leaves_nothing_and_writes_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "out.npy").write_text("precious")
    writer = FrameWriter(open_sink(str(tmp_path / "out.npy"), Fraction(25)), threading.Condition())
    writer.put(FRAMES[0])
    writer.abandon()
    writer.join()
    assert (tmp_path / "out.npy").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]
    gate = Gate()
    writer = FrameWriter(gate, threading.Condition())
    for number in range(3):
        writer.put(np.array([number]))
    writer.abandon()
    gate.open.release(100)
    writer.join()
    assert len(gate.written) <= 1
    assert gate.calls == ["abandon"]


def put_many(writer: FrameWriter, count: int) -> None:
    for number in range(count):
        writer.put(np.array([number]))


@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_failure_comes_back_with_the_next_frame(fails_at: int) -> None:
    gate, changed = Gate(fails_at), threading.Condition()
    writer = FrameWriter(gate, changed)
    gate.open.release(100)
    with pytest.raises(OutputError, match="No space left"):
        put_many(writer, 1000)
    assert gate.written == list(range(fails_at))
    with changed:
        assert changed.wait_for(lambda: writer.queued == 0, 5)
    assert writer.has_room, "who waits for room hears of it"
    writer.finish()
    with pytest.raises(OutputError, match="No space left"):
        writer.join()
    assert (gate.calls, writer.written) == (["salvage"], fails_at)


def test_a_failure_wakes_a_put_that_waits() -> None:
    gate, changed = Gate(0), threading.Condition()
    writer = FrameWriter(gate, changed, depth=1)
    writer.put(np.array([0]))
    with changed:
        assert changed.wait_for(lambda: writer.has_room, 5)
    writer.put(np.array([1]))
    threading.Timer(0.05, gate.open.release).start()
    with pytest.raises(OutputError, match="No space left"):
        writer.put(np.array([2]))


def test_a_failure_in_closing_comes_back(tmp_path: Path) -> None:
    gate = Gate(fails_on="close")
    writer = FrameWriter(gate, threading.Condition())
    writer.finish()
    with pytest.raises(OutputError, match="No space left"):
        writer.join()
    assert gate.calls == ["close", "salvage"]


def test_a_failure_is_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink of which no part can be salvaged, as on a disk that was removed."""
    unexpected: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", unexpected.append)

    class Gone(Gate):
        def salvage(self) -> int:
            raise OSError(5, "Input/output error")

    gate = Gone(fails_at=0)
    gate.open.release()
    writer = FrameWriter(gate, threading.Condition())
    writer.put(np.zeros(1))
    with pytest.raises(OutputError, match="No space left"):
        writer.join()
    assert not unexpected
