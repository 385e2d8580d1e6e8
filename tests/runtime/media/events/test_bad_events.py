"""Events outside the sensor or back in time: named, left out or clamped, counted, and the frames before them kept."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from stepcell.cli import main
from stepcell.errors import InputError, UsageError
from stepcell.event_spec import EventSpec, EventWindow
from stepcell.runtime.media.events import Events, EventSource, write_dat
from stepcell.runtime.media.events.bad_events import BadEvents, OnBadEvent
from stepcell.runtime.media.events.windows import split_windows
from stepcell.runtime.streams.run import run_streams

SIZE = (48, 32)
COUNT = 5000
PLACES = [0, 1, 2500, 4000, COUNT - 1]


def good_events() -> Events:
    """5000 events over a quarter of a second, 20 of each millisecond."""
    rng = np.random.default_rng(0)
    t = 1000 + np.arange(COUNT) * 50
    return Events.of(rng.integers(0, SIZE[0], COUNT), rng.integers(0, SIZE[1], COUNT), rng.integers(0, 2, COUNT), t)


def with_bad(row: int, kind: str) -> Events:
    events = good_events()
    x, t = events.x.copy(), events.t.copy()
    if kind == "outside":
        x[row] = 60
    else:
        t[row] -= 90  # before the event before it
    return Events(x, events.y, events.p, t)


def mended(events: Events, policy: OnBadEvent, parts: int = 1) -> tuple[Events, BadEvents, InputError | None]:
    bad = BadEvents("e.dat", SIZE, policy)
    found, error = [], None
    for rows in np.array_split(np.arange(len(events)), parts):
        part, error = bad.mend(events[rows[0] : rows[-1] + 1])
        found.append(part)
        if error is not None:
            break
    return Events.join(found), bad, error


def assert_same(got: Events, wanted: Events) -> None:
    for name in "xypt":
        assert np.array_equal(getattr(got, name), getattr(wanted, name)), name


def without(events: Events, row: int) -> Events:
    return Events(*(np.delete(getattr(events, name), row) for name in "xypt"))


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("row", PLACES)
def test_outside_the_sensor(row: int, parts: int) -> None:
    events = with_bad(row, "outside")
    kept, bad, error = mended(events, "stop", parts)
    assert_same(kept, events[:row])
    assert f"e.dat: event {row} at (60, {events.y[row]}), {events.t[row]} us: outside the sensor of 48x32" in str(error)
    assert "--on-bad-event drop" in str(error.hint if error else "")
    assert bad.counts == {"outside": 1, "back in time": 0}
    kept, bad, error = mended(events, "drop", parts)
    assert error is None
    assert_same(kept, without(events, row))
    assert bad.counts == {"outside": 1, "back in time": 0}
    kept, bad, error = mended(events, "clamp", parts)
    assert error is None
    assert kept.x[row] == 47
    assert_same(without(kept, row), without(events, row))
    assert bad.counts == {"outside": 1, "back in time": 0}


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("row", PLACES[1:])
def test_back_in_time(row: int, parts: int) -> None:
    events = with_bad(row, "back")
    kept, bad, error = mended(events, "stop", parts)
    assert_same(kept, events[:row])
    assert f"event {row} at ({events.x[row]}, {events.y[row]}), {events.t[row]} us: 40 us earlier than" in str(error)
    kept, bad, error = mended(events, "drop", parts)
    assert error is None
    assert_same(kept, without(events, row))
    kept, bad, error = mended(events, "clamp", parts)
    assert error is None
    assert kept.t[row] == events.t[row - 1]
    assert_same(without(kept, row), without(events, row))
    assert bad.counts == {"outside": 0, "back in time": 1}


def test_the_time_of_an_event_that_is_left_out_counts_for_no_other() -> None:
    events = good_events()
    x, t = events.x.copy(), events.t.copy()
    x[0], t[0] = 60, 10**12
    kept, bad, _ = mended(Events(x, events.y, events.p, t), "drop")
    assert_same(kept, events[1:])
    assert bad.counts == {"outside": 1, "back in time": 0}


def test_pixels_below_zero_and_beyond_16_bits_are_outside() -> None:
    wide = Events(np.array([-1, 70_000, 5]), np.array([3, 4, 5]), np.ones(3, bool), np.arange(3))
    kept, bad, _ = mended(wide, "drop")
    assert (kept.x.tolist(), kept.x.dtype) == ([5], np.uint16)
    assert bad.counts["outside"] == 2
    kept, _, _ = mended(wide, "clamp")
    assert kept.x.tolist() == [0, 47, 5]


def test_the_first_of_each_kind_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    events = good_events()
    x, t = events.x.copy(), events.t.copy()
    x[[7, 8, 4000]], t[[20, 21]] = 99, 0
    with caplog.at_level(logging.WARNING):
        mended(Events(x, events.y, events.p, t), "drop", parts=3)
    assert [record.message.split(" at ")[0] for record in caplog.records] == ["e.dat: event 7", "e.dat: event 20"]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["run", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("kind", ["outside", "back"])
@pytest.mark.parametrize(("row", "frames"), [(0, 0), (2500, 12), (COUNT - 1, 24)])
def test_the_frames_before_a_bad_event_are_kept(
    firenet_onnx: Path, row: int, frames: int, kind: str, tmp_path: Path
) -> None:
    """Each window is 10 ms, that is 200 events; all are one part of the file."""
    row = max(row, int(kind == "back"))
    write_dat(tmp_path / "e.dat", [with_bad(row, kind)], SIZE)
    result = run(firenet_onnx, "-i", tmp_path / "e.dat", "--event-window", "10ms", "-o", tmp_path / "out.npy")
    assert result.exit_code == 1
    assert f"event {row} at" in " ".join(result.stderr.split())
    assert "--on-bad-event" in result.stderr
    assert (len(np.load(tmp_path / "out.npy")) if frames else 0) == frames
    assert (tmp_path / "out.npy").exists() == (frames > 0)


def test_bad_events_are_in_the_report(firenet_onnx: Path, tmp_path: Path) -> None:
    events = with_bad(2500, "outside")
    t = events.t.copy()
    t[[100, 200, 4999]] -= 60
    write_dat(tmp_path / "e.dat", [Events(events.x, events.y, events.p, t)], SIZE)
    for policy in ("drop", "clamp"):
        result = run(
            firenet_onnx, "-i", tmp_path / "e.dat", "--event-window", "10ms", "--on-bad-event", policy, "--json"
        )
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["bad_events"] == {"outside": 1, "back in time": 3}
        assert report["frames"] == 25
        assert "bad events: 1 outside, 3 back in time" in result.stderr
    with pytest.raises(UsageError, match="stop, drop or clamp"):
        run_streams(firenet_onnx, str(tmp_path / "e.dat"), on_bad_event="keep")  # type: ignore[arg-type]


def test_npz_keeps_the_events_before_what_has_no_meaning(tmp_path: Path) -> None:
    events = good_events()
    p, t = events.p.astype(np.int8), events.t / 1e6
    p[3000], t[2500] = 7, np.nan
    np.savez(tmp_path / "e.npz", x=events.x, y=events.y, p=p, t=t)
    spec = EventSpec(representation="voxel_grid", bins=2, window=EventWindow(size=100, unit="events"))
    with contextlib.closing(EventSource(tmp_path / "e.npz", spec, SIZE)) as source:
        frames = iter(source)
        for _ in range(25):
            next(frames)
        with pytest.raises(InputError, match="event 2500: t: expected seconds, at most 1e12, got nan"):
            next(frames)


def test_npz_keeps_the_events_before_damaged_bytes(tmp_path: Path) -> None:
    count = 200_000
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(0, 30, count) for name in "xy"}
    np.savez_compressed(tmp_path / "e.npz", **columns, p=np.ones(count, bool), t=rng.integers(0, 9, count).cumsum())
    data = bytearray((tmp_path / "e.npz").read_bytes())
    at = data.rindex(b"t.npy", 0, len(data) - 1000) + 150_000  # inside the compressed times
    data[at : at + 64] = bytes(64)
    (tmp_path / "e.npz").write_bytes(data)
    spec = EventSpec(representation="voxel_grid", bins=2, window=EventWindow(size=1000, unit="events"))
    found: list[object] = []
    source = EventSource(tmp_path / "e.npz", spec, SIZE, on_bad_event="clamp")
    with contextlib.closing(source), pytest.raises(InputError, match="expected a time within"):
        found.extend(source)  # what is unpacked from damaged bytes, until the unpacking ends, are impossible times
    assert len(found) > 100


def test_windows_before_a_pause_that_is_too_long_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPCELL_MAX_EMPTY_WINDOWS", "100")
    events = good_events()
    t = events.t.copy()
    t[4000:] += 10**9
    windows = split_windows([Events(events.x, events.y, events.p, t)], EventWindow(size=10_000, unit="us"), 1)
    found = [next(windows) for _ in range(20)]
    assert sum(len(part) for part, _ in found) == 4000
    with pytest.raises(InputError, match="a pause of 1000000000 us in windows of 10000 us, or times of another unit"):
        next(windows)


@pytest.mark.parametrize(("factor", "said"), [(1e-6, False), (1.0, True), (1000, True)])
def test_times_in_another_unit_are_told(
    factor: float, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Floats are seconds and integers microseconds."""
    events = good_events()
    np.savez(tmp_path / "e.npz", x=events.x, y=events.y, p=events.p, t=events.t * factor)
    spec = EventSpec(representation="voxel_grid", bins=2, window=EventWindow(size=1000, unit="us"))
    with contextlib.closing(EventSource(tmp_path / "e.npz", spec, SIZE)) as source, caplog.at_level(logging.WARNING):
        for number, _ in enumerate(source):
            if number == 110:
                break
    assert ("of the first 100 windows of 1000 us hold no event" in caplog.text) == said


def test_float_nanoseconds_are_told(tmp_path: Path) -> None:
    events = good_events()
    np.savez(tmp_path / "e.npz", x=events.x, y=events.y, p=events.p, t=events.t * 1e3)
    spec = EventSpec(representation="voxel_grid", bins=2, window=EventWindow(size=1000, unit="us"))
    with (
        contextlib.closing(EventSource(tmp_path / "e.npz", spec, SIZE)) as source,
        pytest.raises(InputError, match="or times of another unit"),
    ):
        list(source)
