"""Frame reader: order, bounded queue, errors, and reconnection."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.models.zoo.clips import clip_path
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.raw_frames import RawSource
from stepcell.runtime.streams.frame_reader import DEPTH, Frame, FrameReader
from stepcell.runtime.streams.reconnect import Reconnect


class Counting:
    """A source that counts the frames read."""

    name = "counting"
    fps: Fraction | None = None
    length: int | None = None
    live = False
    seconds: float | None = None

    def __init__(self, count: int, then: BaseException | None = None) -> None:
        self.read = 0
        self.closed = False
        self._count, self._then = count, then

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for number in range(self._count):
            self.read += 1
            yield np.full((2, 2, 3), number % 256, np.uint8)
        if self._then is not None:
            raise self._then

    def close(self) -> None:
        self.closed = True


def until(changed: threading.Condition, true: Callable[[], bool], seconds: float = 10.0) -> None:
    with changed:
        assert changed.wait_for(true, seconds), f"not within {seconds} s"


def take_all(reader: FrameReader, changed: threading.Condition, seconds: float = 20.0) -> list[Frame]:
    frames = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with changed:
            changed.wait_for(lambda: reader.queued or reader.ended, 1.0)
        frame = reader.take()
        if frame is not None:
            frames.append(frame)
        elif reader.ended:
            return frames
    raise AssertionError(f"{len(frames)} frames and no end after {seconds} s")


def test_every_frame_of_a_clip_in_order() -> None:
    changed = threading.Condition()
    path = str(clip_path("carphone_pristine"))
    source = open_source(path)
    expected, times = [], []
    for frame in source:
        expected.append(frame)
        times.append(source.seconds)
    reader = FrameReader(open_source(path), changed)
    frames = take_all(reader, changed)
    np.testing.assert_array_equal([frame.array for frame in frames], expected)
    assert [frame.seconds for frame in frames] == times
    assert all(a.arrived <= b.arrived for a, b in itertools.pairwise(frames))
    assert {frame.connection for frame in frames} == {0}
    assert (reader.dropped, reader.reconnects) == (0, 0)


def test_a_source_waits_for_room() -> None:
    changed, source = threading.Condition(), Counting(1000)
    reader = FrameReader(source, changed)
    until(changed, lambda: source.read == DEPTH + 1)  # the thread holds one more
    for taken in range(1, 50):
        assert reader.take() is not None
        until(changed, lambda taken=taken: source.read == DEPTH + 1 + taken)  # type: ignore[misc]
        assert reader.queued <= DEPTH
    reader.stop()
    reader.join()
    assert source.closed
    assert source.read == DEPTH + 50


def test_the_oldest_gives_way_and_is_counted() -> None:
    changed = threading.Condition()
    reader = FrameReader(Counting(200), changed, drop_oldest=True, depth=3)
    until(changed, lambda: reader._done)
    frames = take_all(reader, changed)
    assert [int(frame.array[0, 0, 0]) for frame in frames] == [197, 198, 199]
    assert reader.dropped == 197


def test_a_reconnection_shows_where_its_first_frame_gave_way() -> None:
    changed, again = threading.Condition(), iter([Counting(9)])
    reconnect = Reconnect(lambda: next(again, Counting(0)), 0.2, first=0.001, most=0.001)
    reader = FrameReader(Counting(5), changed, drop_oldest=True, depth=3, reconnect=reconnect)
    until(changed, lambda: reader._done)
    frames = [reader.take() for _ in range(3)]
    assert [(int(frame.array[0, 0, 0]), frame.connection) for frame in frames if frame] == [(6, 1), (7, 1), (8, 1)]


@pytest.mark.parametrize("error", [InputError("counting: broken at frame 3"), KeyboardInterrupt(), ValueError("other")])
def test_an_error_comes_after_the_frames_before_it(error: BaseException) -> None:
    changed = threading.Condition()
    source = Counting(3, error)
    reader = FrameReader(source, changed)
    until(changed, lambda: reader._done)
    assert [int(reader.take().array[0, 0, 0]) for _ in range(3)] == [0, 1, 2]  # type: ignore[union-attr]
    assert reader.ended
    with pytest.raises(type(error)):
        reader.take()
    assert reader.take() is None
    assert source.closed


def test_a_read_that_hangs_is_left_behind() -> None:
    read_end, write_end = os.pipe()
    changed = threading.Condition()
    with os.fdopen(read_end, "rb") as stream:
        reader = FrameReader(RawSource(stream, (2, 2), 3), changed)
        started = time.monotonic()
        reader.stop()
        reader.join()
        assert time.monotonic() - started < 5
        os.close(write_end)  # ends the read
        reader._thread.join(5)
        assert not reader._thread.is_alive()


def test_many_reads_that_hang_are_left_behind_together() -> None:
    gate, changed = threading.Event(), threading.Condition()

    class Hanging(Counting):
        def __iter__(self) -> Iterator[NDArray[Any]]:
            gate.wait(60)
            return iter(())

    readers = [FrameReader(Hanging(0), changed) for _ in range(20)]
    started = time.monotonic()
    for reader in readers:
        reader.stop()
    for reader in readers:
        reader.join()
    assert time.monotonic() - started < 10, "one after the other takes twenty seconds"
    gate.set()
    for reader in readers:
        reader._thread.join(10)


def test_a_source_that_cannot_be_closed_ends_all_the_same() -> None:
    class Stuck(Counting):
        def close(self) -> None:
            raise OSError(5, "Input/output error")

    changed = threading.Condition()
    reader = FrameReader(Stuck(1), changed)
    until(changed, lambda: reader._done)
    assert reader.take() is not None
    with pytest.raises(OSError, match="Input/output error"):
        reader.take()


def test_waits_grow_to_a_bound_and_differ() -> None:
    reconnect = Reconnect(lambda: Counting(1), 100.0, first=0.5, most=8.0)
    for attempt, most in enumerate([0.5, 1, 2, 4, 8, 8, 8]):
        delays = [reconnect.delay(attempt) for _ in range(200)]
        assert most / 2 <= min(delays) < max(delays) <= most
        assert max(delays) - min(delays) > most / 4
    assert reconnect.delay(10**9) <= 8.0


def test_waits_begin_anew_after_a_frame(logged: pytest.LogCaptureFixture) -> None:
    attempts = []

    class Watched(Reconnect):
        def delay(self, attempt: int) -> float:
            attempts.append(attempt)
            return 0.001

    sources = iter([Counting(0), Counting(0), Counting(2), Counting(0), Counting(1)])
    changed = threading.Condition()
    reader = FrameReader(Counting(1), changed, reconnect=Watched(lambda: next(sources, Counting(0)), 0.2))
    with pytest.raises(InputError, match="not reconnected within"):
        take_all(reader, changed)
    assert attempts[:5] == [0, 1, 2, 0, 1]
    assert attempts[5:] == list(range(len(attempts) - 5))
    assert logged.text.count("reconnecting") == 3, "once for each time it was lost"
    assert reader.reconnects == 2


def test_a_camera_comes_back(camera: Any, logged: pytest.LogCaptureFixture) -> None:
    """It disconnects in the middle, is off for a while, and sends from its first frame again."""
    changed = threading.Condition()
    camera.cut = 0.5
    reconnect = Reconnect(lambda: open_source(camera.url), 60.0, first=0.05, most=0.1)
    reader = FrameReader(open_source(camera.url), changed, reconnect=reconnect)
    before = []
    while len(before) < 20:
        until(changed, lambda: reader.queued > 0)
        before.append(reader.take())
    camera.switch_off()
    while reader._attempts < 3:  # attempts that fail
        if reader.take() is None:
            time.sleep(0.01)
    camera.cut = 1.0
    camera.switch_on()
    after: list[Frame] = []
    while len(after) < 50:
        until(changed, lambda: reader.queued > 0)
        frame = reader.take()
        assert frame is not None
        if frame.connection or after:
            after.append(frame)
    assert {frame.connection for frame in after} == {1}
    assert reader.reconnects == 1
    camera.switch_off()
    reader.stop()
    reader.join()
    np.testing.assert_array_equal(after[0].array, before[0].array)  # type: ignore[union-attr]
    # The clock of the source restarted; that of the frames continues, with the gap.
    times = [frame.seconds for frame in [*before, *after] if frame and frame.seconds is not None]
    assert len(times) == 70
    steps = np.diff(times)
    assert (steps > 0).all(), steps.min()
    assert steps.max() > 0.1
    err = logged.text
    assert f"{camera.url}: lost (the stream ended); reconnecting" in " ".join(err.split())
    assert err.count("reconnected after") == 1


def test_a_camera_that_stays_away_is_given_up(camera: Any) -> None:
    changed = threading.Condition()
    camera.cut = 0.3
    reconnect = Reconnect(lambda: open_source(camera.url), 0.3, first=0.01, most=0.05)
    source = open_source(camera.url)
    camera.switch_off()
    started = time.monotonic()
    reader = FrameReader(source, changed, reconnect=reconnect)
    with pytest.raises(InputError, match=r"lost and not reconnected within 0.3 s \(.*cannot be opened as video"):
        take_all(reader, changed)
    assert 0.3 < time.monotonic() - started < 10


def test_a_camera_that_is_not_there_yet(camera: Any) -> None:
    camera.switch_off()
    changed = threading.Condition()
    reconnect = Reconnect(lambda: open_source(camera.url), 30.0, first=0.02, most=0.05)
    reader = FrameReader(None, changed, name=camera.url, reconnect=reconnect)
    until(changed, lambda: True)
    while reader._attempts < 2:
        time.sleep(0.01)
    assert reader.take() is None
    assert not reader.ended
    camera.switch_on()
    until(changed, lambda: reader.queued > 0)
    reader.stop()
    reader.join()
