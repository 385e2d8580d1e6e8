"""DAT, RAW and NPZ readers: events in parts of any length, and files that are refused."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import InputError, OutputError
from stepcell.runtime.media.events import Events, write_dat
from stepcell.runtime.media.events.bad_events import BadEvents
from stepcell.runtime.media.events.evt2 import Evt2
from stepcell.runtime.media.events.evt3 import Evt3
from stepcell.runtime.media.events.formats import open_events
from stepcell.runtime.media.events.reader import validated
from tests.runtime.media.events.files import (
    SIZE,
    assert_same,
    encode_evt2,
    encode_evt3,
    read,
    sensor,
    some_events,
    write_raw,
)

CHUNKS = [f"stepcell.runtime.media.events.{name}.CHUNK" for name in ("dat", "raw", "npz")]


def in_parts(decoder: Evt2 | Evt3, words: NDArray[Any], seed: int) -> Events:
    cuts = np.sort(np.random.default_rng(seed).integers(1, len(words), 50))
    return Events.join([decoder.decode(part) for part in np.split(words, np.unique(cuts))])


def write_npz(path: Path, events: Events, **other: Any) -> Path:
    columns = {name: getattr(events, name) for name in "xypt"}
    np.savez_compressed(path, **{**columns, "width": SIZE[0], "height": SIZE[1], **other})
    return path


@pytest.fixture(params=[1 << 20, 7])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Records read at a time: the whole file, or a few events."""
    for name in CHUNKS:
        monkeypatch.setattr(name, request.param)
    return int(request.param)


def test_dat_comes_back(tmp_path: Path, chunk: int) -> None:
    events = some_events()
    count = write_dat(tmp_path / "e.dat", [events[:100], events[100:]], SIZE)
    assert count == len(events)
    assert sensor(tmp_path / "e.dat") == SIZE
    assert_same(read(tmp_path / "e.dat"), events)


def test_dat_has_the_documented_bytes(tmp_path: Path) -> None:
    one = np.array([1])
    write_dat(tmp_path / "e.dat", [Events.of(one * 5, one * 3, one, one * 0x01020304)], (16, 8))
    header = b"% Data file containing CD events\n% Version 2\n% Width 16\n% Height 8\n"
    word = 1 << 28 | 3 << 14 | 5
    assert (tmp_path / "e.dat").read_bytes() == header + b"\x0c\x08" + b"\x04\x03\x02\x01" + word.to_bytes(4, "little")


def test_dat_goes_on_after_its_clock_has_turned(tmp_path: Path, chunk: int) -> None:
    events = some_events(span=9 << 31)  # the counter wraps four times
    write_dat(tmp_path / "e.dat", [events], SIZE)
    assert_same(read(tmp_path / "e.dat"), events)


@pytest.mark.parametrize("seed", range(5))
def test_evt2_comes_back(seed: int, tmp_path: Path) -> None:
    events = some_events(2000, seed=seed)
    words = encode_evt2(events)
    assert_same(in_parts(Evt2(), words, seed), events)
    assert_same(read(write_raw(tmp_path / "e.raw", words, "evt 2.0", "geometry 640x480")), events)


def test_evt2_by_hand() -> None:
    words = np.array(
        [
            0 << 28 | 9 << 22 | 1 << 11 | 1,  # before the first time word: skipped
            8 << 28 | 2,  # 2 * 64 us
            1 << 28 | 5 << 22 | 300 << 11 | 200,
            10 << 28 | 7,  # a trigger
            0 << 28 | 63 << 22 | 7 << 11 | 2047,
            8 << 28 | 3,
            1 << 28,
        ],
        "<u4",
    )
    events = Evt2().decode(words)
    assert [getattr(events, name).tolist() for name in "xypt"] == [
        [300, 7, 0],
        [200, 2047, 0],
        [True, False, True],
        [133, 191, 192],
    ]


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_evt3_comes_back(seed: int, vectors: bool, tmp_path: Path) -> None:
    events = some_events(2000, seed=seed)
    order = np.lexsort((events.x, events.p, events.y, events.t))
    events = Events(*(getattr(events, name)[order] for name in "xypt"))
    words = encode_evt3(events, vectors=vectors)
    if vectors:
        assert {3, 4, 5} <= set((words >> 12).tolist()), "no vector was made"
    assert_same(in_parts(Evt3(), words, seed), events)
    path = write_raw(tmp_path / "e.raw", words, "format EVT3;height=480;width=640")
    assert sensor(path) == SIZE
    assert_same(read(path), events)


def test_evt3_by_hand() -> None:
    words = np.array(
        [
            0x2805,  # before the first time and row words: skipped
            0x8001,  # time, upper half 1: 4096 us
            0x6002,  # lower half 2
            0x0010,  # row 16
            0x2805,  # rising at x = 5
            0x3064,  # base 100, falling
            0x4801,  # 100 and 111; base 112
            0x5FC1,  # 112, 118, 119: the upper bits are unused; base 120
            0x5001,  # 120
            0x8001,  # the same upper half again: the lower half stays
            0x2006,
            0x8002,  # increased: the lower half is zero
            0x2007,
            0xE123,  # other words are skipped
            0xF456,
            0x8FFF,  # the last one
            0x6001,
            0x2008,
            0x8000,  # the counter has wrapped
            0x2009,
        ],
        "<u2",
    )
    events = Evt3().decode(words)
    assert events.x.tolist() == [5, 100, 111, 112, 118, 119, 120, 6, 7, 8, 9]
    assert set(events.y.tolist()) == {16}
    assert events.p.tolist() == [True] + [False] * 10
    assert events.t.tolist() == [4098] * 8 + [8192, 0xFFF001, 1 << 24]


def test_npz_comes_back(tmp_path: Path, chunk: int) -> None:
    events = some_events(500)
    assert_same(read(write_npz(tmp_path / "e.npz", events)), events)
    signs = np.where(events.p, 1, -1)
    seconds = events.t / 1e6
    other = write_npz(tmp_path / "f.npz", events, p=signs.astype(np.int8), t=seconds, x=events.x.astype(">i8"))
    assert_same(read(other), events)


EVENTS = some_events(100)
BACK = np.concatenate([EVENTS.t[:50], EVENTS.t[50:] - EVENTS.t[60]])
HEADER = b"% Data file containing CD events\n% Version 2\n% Width 640\n% Height 480\n\x0c\x08"


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("e.npz", lambda path: write_npz(path, EVENTS, t=BACK), r"event 50 at \(\d+, \d+\), -?\d+ us: \d+ us earlier"),
        ("e.npz", lambda path: write_npz(path, EVENTS, t=np.full(100, np.nan)), "event 0: t: expected seconds.* nan"),
        *(
            ("e.npz", partial(write_npz, events=EVENTS, t=times), f"event {row}: expected a time within .* of 0")
            for row, times in (
                (0, np.full(100, 1e10)),
                (50, np.where(np.arange(100) < 50, 0, 1 << 62)),
                (0, np.full(100, -(1 << 63))),
                (0, np.full(100, 1 << 63, np.uint64)),
            )
        ),
        ("e.npz", lambda path: write_npz(path, EVENTS, x=EVENTS.x + 640), r"event 0 at \(\d+, \d+\), \d+ us: outside"),
        (
            "e.npz",
            lambda path: write_npz(path, EVENTS, x=EVENTS.x.astype(int) - 700),
            r"event 0 at \(-\d+, \d+\), \d+ us: outside",
        ),
        (
            "e.npz",
            lambda path: write_npz(path, EVENTS, y=EVENTS.y + 41),
            r"at \(\d+, 481\), \d+ us: outside the sensor",
        ),
        ("e.npz", lambda path: write_npz(path, EVENTS, x=EVENTS.x / 2), "x: expected another dtype"),
        ("e.npz", lambda path: write_npz(path, EVENTS, p=np.full(100, 2)), "p: expected 0 and 1"),
        ("e.npz", lambda path: write_npz(path, EVENTS, y=EVENTS.y[1:]), "same length"),
        ("e.npz", lambda path: write_npz(path, EVENTS, y=EVENTS.y[:, None]), "one number per event"),
        ("e.npz", lambda path: write_npz(path, EVENTS, y=np.array([{}] * 100)), "one number per event"),
        ("e.npz", lambda path: write_npz(path, EVENTS[:0]), "contains no event"),
        ("e.npz", lambda path: np.savez(path, x=EVENTS.x, t=EVENTS.t), "missing y, p"),
        ("e.npz", lambda path: path.write_bytes(b"PK nothing"), "not a readable .npz"),
        ("e.dat", lambda path: path.write_bytes(HEADER), "contains no event"),
        ("e.dat", lambda path: path.write_bytes(HEADER + bytes(11)), "truncated: ends 3 bytes into a record of 8"),
        ("e.dat", lambda path: path.write_bytes(HEADER[:-1] + b"\x07"), "not a DAT file"),
        ("e.dat", lambda path: path.write_bytes(b"\x00" * 100), "not a DAT file"),
        ("e.dat", lambda path: path.write_bytes(b""), "contains no event: the file is empty"),
        ("e.dat", lambda path: path.write_bytes(HEADER.replace(b"2", b"1", 1)), "DAT version 1"),
        ("e.raw", lambda path: write_raw(path, encode_evt3(EVENTS), "evt 4.0"), "encoding 4.0: only EVT 2.0"),
        ("e.raw", lambda path: path.write_bytes(b"\x00" * 100), "not a RAW file of events: its header names no"),
        ("e.raw", lambda path: path.write_bytes(HEADER), "not a RAW file of events: its header names no"),
        ("e.raw", lambda path: path.write_bytes(b""), "the file is empty"),
        ("e.raw", lambda path: write_raw(path, np.zeros(9, np.uint8), "evt 3.0"), "ends 1 bytes into a record of 2"),
        ("e.raw", lambda path: write_raw(path, np.zeros(9, np.uint16), "evt 3.0"), "contains no event"),
        ("missing.raw", lambda path: path.exists(), "No such file"),
    ],
)
def test_what_is_no_events_is_refused(name: str, write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_a_time_that_goes_back_between_two_parts_is_seen(tmp_path: Path, chunk: int) -> None:
    t = EVENTS.t.copy()
    t[49:] -= t[49] - t[48] + 1  # event 49 is the first of a part of seven
    with pytest.raises(InputError, match=r"event 49 at .*: 1 us earlier"):
        read(write_npz(tmp_path / "e.npz", EVENTS, t=t))


def test_a_cut_npz_is_refused(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "whole.npz", EVENTS).read_bytes()
    for end in range(0, len(data), 41):
        (tmp_path / "e.npz").write_bytes(data[:end])
        with pytest.raises(InputError):
            read(tmp_path / "e.npz")


def test_spoilt_bytes_never_crash(tmp_path: Path) -> None:
    """Damaged bytes give events, or an error that names the file."""
    rng = np.random.default_rng(0)
    write_dat(tmp_path / "e.dat", [EVENTS], SIZE)
    write_npz(tmp_path / "e.npz", EVENTS)
    write_raw(tmp_path / "e.raw", encode_evt3(EVENTS), "evt 3.0", "geometry 640x480")
    refused = 0
    for path in (tmp_path / "e.dat", tmp_path / "e.npz", tmp_path / "e.raw"):
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            spoilt = whole.copy()
            spoilt[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
            path.write_bytes(spoilt.tobytes())
            try:
                read(path)
            except InputError as error:
                refused += path.name in str(error)
    assert refused > 60, f"only {refused} of 180 were seen to be spoilt"


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = some_events(300_000)
    write_dat(tmp_path / "e.dat", [events], SIZE)
    write_npz(tmp_path / "e.npz", events)
    write_raw(tmp_path / "e.raw", encode_evt2(events), "evt 2.0", "geometry 640x480")
    for name in CHUNKS:
        monkeypatch.setattr(name, 1000)
    for path in (tmp_path / "e.dat", tmp_path / "e.npz", tmp_path / "e.raw"):
        count = 0
        with contextlib.closing(open_events(path)) as reader:
            tracemalloc.start()
            for part in validated(reader, BadEvents(reader.name, SIZE)):
                count += len(part)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert count == 300_000
        assert peak < 1_000_000, f"{path.name}: {peak} bytes for a file of {path.stat().st_size}"


def test_dat_is_not_left_half_written(tmp_path: Path) -> None:
    early = Events.of(EVENTS.x, EVENTS.y, EVENTS.p, EVENTS.t - 10**9)
    with pytest.raises(OutputError, match="cannot store a negative time"):
        write_dat(tmp_path / "e.dat", [EVENTS, early], SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [np.inf, np.nan, -3, 0, 1j, 300_000], ids=str)
def test_npz_with_a_sensor_of_no_size(width: complex, tmp_path: Path) -> None:
    columns = {name: np.ones(3, np.int64) for name in "xypt"}
    np.savez(tmp_path / "events.npz", **columns, width=width, height=480)
    with pytest.raises(InputError, match="width: expected 1 to 16384 pixels"):
        open_events(tmp_path / "events.npz")
