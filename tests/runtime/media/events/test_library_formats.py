"""Formats read through other packages: AEDAT4, Event Stream, HDF5, rosbags, Parquet.

A test is skipped where its package is not installed; tests/runtime/media/events/writers.py writes the files.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell.errors import InputError, MissingDependencyError, UsageError
from stepcell.runtime.media.events import Events
from stepcell.runtime.media.events.formats import open_events
from tests.runtime.media.events.files import SIZE, assert_same, read, sensor, some_events
from tests.runtime.media.events.writers import write_aedat4, write_es, write_rosbag

EVENTS = some_events(3000)
EARLIER = Events(EVENTS.x, EVENTS.y, EVENTS.p, EVENTS.t - EVENTS.t[0])


def of_stream(path: Path, stream: str) -> Events:
    reader = open_events(path, stream)
    events = Events.join(list(reader))
    reader.close()
    return events


def test_aedat4(tmp_path: Path) -> None:
    pytest.importorskip("aedat")
    path = write_aedat4(tmp_path / "e.aedat4", {0: EVENTS}, SIZE)
    assert_same(read(path), EVENTS)
    assert sensor(path) == SIZE


def test_one_of_several_streams_of_aedat4(tmp_path: Path) -> None:
    pytest.importorskip("aedat")
    path = write_aedat4(tmp_path / "e.aedat4", {0: EVENTS[:100], 3: EVENTS[100:]}, SIZE)
    with pytest.raises(UsageError, match=r"has 2 streams of events: 0, 3") as error:
        read(path)
    assert error.value.hint == "choose one: --event-stream 0"
    assert_same(of_stream(path, "3"), EVENTS[100:])
    with pytest.raises(UsageError, match=r"--event-stream 1: .* has no such stream"):
        open_events(path, "1")


def test_damaged_headers_of_aedat4(tmp_path: Path) -> None:
    pytest.importorskip("aedat")
    whole = write_aedat4(tmp_path / "e.aedat4", {0: EVENTS[:10]}, SIZE).read_bytes()
    start = whole.index(b"IOHE") - 4
    for at in range(start, start + 40):
        for value in (0x00, 0x7F, 0xFF):
            (tmp_path / "e.aedat4").write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            with contextlib.suppress(InputError):  # no other error, and the process goes on
                read(tmp_path / "e.aedat4")


def test_event_stream_counts_rows_from_below(tmp_path: Path) -> None:
    pytest.importorskip("faery")
    path = write_es(tmp_path / "e.es", EARLIER, SIZE)
    assert_same(read(path), EARLIER)
    assert sensor(path) == SIZE


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"Event Stream\x02\x00\x00\x02\x40\x01\xf0\x00", "ATIS events, expected DVS"),
        (b"Event Stream\x02\x00\x00\x09", "of 9 events, expected DVS"),
        (b"Event", "not an Event Stream file"),
    ],
)
def test_other_event_streams(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "e.es").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "e.es")


def write_hdf5(path: Path, group: str, names: str = "x y p t", **other: Any) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, column in zip(names.split(), "xypt", strict=True):
            file.create_dataset(f"{group}/{name}", data=other.get(column, getattr(EVENTS, column)), compression="gzip")
        for name in other.keys() - set("xypt"):
            file[name.replace("__", "/")] = other[name]
    return path


def test_dsec(tmp_path: Path) -> None:
    """As its files are: the time from an offset on, an index of milliseconds, Blosc where hdf5plugin is installed."""
    base = int(EVENTS.t[0])
    t, index = (EVENTS.t - base).astype(np.uint32), np.arange(9)
    path = write_hdf5(tmp_path / "events.h5", "events", t=t, t_offset=base, ms_to_idx=index)
    assert_same(read(path), EVENTS)
    assert sensor(path) is None


def test_blosc(tmp_path: Path) -> None:
    h5py, plugin = pytest.importorskip("h5py"), pytest.importorskip("hdf5plugin")
    with h5py.File(tmp_path / "events.h5", "w") as file:
        for name in "xypt":
            file.create_dataset(f"events/{name}", data=getattr(EVENTS, name), **plugin.Blosc(cname="zstd"))
    assert_same(read(tmp_path / "events.h5"), EVENTS)


def test_what_is_before_the_damage_in_hdf5_is_kept(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    events = some_events(20_000)
    with h5py.File(tmp_path / "e.h5", "w") as file:
        for name in "xypt":
            file.create_dataset(f"events/{name}", data=getattr(events, name), chunks=(5000,), compression="gzip")
        place = file["events/t"].id.get_chunk_info(2).byte_offset  # events 10,000 to 14,999
    data = (tmp_path / "e.h5").read_bytes()
    (tmp_path / "e.h5").write_bytes(data[:place] + bytes(200) + data[place + 200 :])
    reader = open_events(tmp_path / "e.h5")
    parts = []
    with pytest.raises(InputError, match="events 8192 on: broken"):
        parts.extend(reader)
    reader.close()
    assert_same(Events.join(parts), events[:8192])


@pytest.mark.parametrize(
    ("group", "names", "other", "size"),
    [
        ("/", "x y p t", {}, None),
        ("events", "xs ys ps ts", {"t": EVENTS.t / 1e6, "p": EVENTS.p * 2 - 1}, None),
        ("events", "x y p t", {"events__width": 640, "events__height": 480, "p": EVENTS.p}, SIZE),
        ("prophesee/left", "x y p t", {}, None),
    ],
)
def test_relatives_of_dsec(
    group: str, names: str, other: dict[str, Any], size: tuple[int, int] | None, tmp_path: Path
) -> None:
    path = write_hdf5(tmp_path / "e.hdf5", group, names, **other)
    assert_same(read(path), EVENTS)
    assert sensor(path) == size


def test_events_as_one_table_of_hdf5(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    table = np.empty(len(EVENTS), [("x", "<u2"), ("y", "<u2"), ("p", "<i2"), ("t", "<i8")])
    for name in "xypt":
        table[name] = getattr(EVENTS, name)
    with h5py.File(tmp_path / "e.hdf5", "w") as file:
        file["CD/events"] = table
        file["EXT_TRIGGER/events"] = np.zeros(3, [("p", "i2"), ("t", "i8"), ("id", "i2")])
        file.attrs["sensor_resolution"] = [480, 640]
    assert_same(read(tmp_path / "e.hdf5"), EVENTS)
    assert sensor(tmp_path / "e.hdf5") == SIZE


def test_mvsec(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    table = np.stack([EVENTS.x, EVENTS.y, EVENTS.t / 1e6 + 1.5e9, EVENTS.p * 2.0 - 1], 1)
    with h5py.File(tmp_path / "e.hdf5", "w") as file:
        file["davis/left/events"] = table
        file["davis/left/image_raw"] = np.zeros((2, 4, 4), np.uint8)
    later = Events(EVENTS.x, EVENTS.y, EVENTS.p, EVENTS.t + 1_500_000_000_000_000)
    assert_same(read(tmp_path / "e.hdf5"), later)
    with h5py.File(tmp_path / "e.hdf5", "w") as file:
        file["davis/left/events"] = table[:, [2, 0, 1, 3]]
    with pytest.raises(InputError, match="event 0: x: expected a pixel"):
        read(tmp_path / "e.hdf5")


def test_two_groups_of_hdf5(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(write_hdf5(tmp_path / "e.h5", "left/events"), "a") as file:
        file.copy("left", "right")
    with pytest.raises(UsageError, match="has 2 groups of events: left/events, right/events"):
        read(tmp_path / "e.h5")
    assert_same(of_stream(tmp_path / "e.h5", "right/events"), EVENTS)


def test_ecf_is_refused_by_name(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    table = np.zeros(9, [("x", "<u2"), ("y", "<u2"), ("p", "<i2"), ("t", "<i8")])
    with h5py.File(tmp_path / "e.hdf5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((9,))
        plist.set_filter(0x8ECF, h5py.h5z.FLAG_OPTIONAL, ())
        group, space = file.create_group("CD"), h5py.h5s.create_simple((9,))
        h5py.h5d.create(group.id, b"events", h5py.h5t.py_create(table.dtype), space, plist)
    with pytest.raises(InputError, match="Prophesee's codec ECF") as error:
        read(tmp_path / "e.hdf5")
    assert f"metavision_file_to_dat -i {tmp_path / 'e.hdf5'}" in (error.value.hint or "")


def test_values_outside_an_hdf5_file_are_not_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(bytes(800))
    with h5py.File(tmp_path / "e.h5", "w") as file:
        for name in "xypt":
            file.create_dataset(f"events/{name}", (100,), "u8", external=[(str(tmp_path / "secret"), 0, 800)])
    with pytest.raises(InputError, match="in another file, which is not read"):
        read(tmp_path / "e.h5")
    whole = write_hdf5(tmp_path / "whole.h5", "events")
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["events"] = h5py.ExternalLink(str(whole), "events")
    with pytest.raises(InputError, match="has no group of events"):
        read(tmp_path / "e.h5")


KINDS = ["dvs_msgs", "evt2", "evt21", "evt3", "mono", "libcaer", "libcaer_cmp"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ros", [1, 2])
def test_rosbags(ros: int, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("rosbags")
    path = write_rosbag(tmp_path / ("e.bag" if ros == 1 else "e"), {"/camera/events": EVENTS}, SIZE, kind)
    assert_same(read(path), EVENTS)
    assert sensor(path) == SIZE
    if ros == 2:
        assert_same(read(path / "e.db3"), EVENTS)


def test_a_rosbag_of_two_cameras(tmp_path: Path) -> None:
    pytest.importorskip("rosbags")
    streams = {"/left/events": EVENTS[:9], "/right/events": EVENTS[9:]}
    path = write_rosbag(tmp_path / "e.bag", streams, SIZE, "dvs_msgs")
    with pytest.raises(UsageError, match="has 2 topics of events: /left/events, /right/events"):
        read(path)
    assert_same(of_stream(path, "/right/events"), EVENTS[9:])


def test_messages_that_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("rosbags")
    path = write_rosbag(tmp_path / "e.bag", {"/camera": EVENTS}, SIZE, "other")
    with pytest.raises(
        InputError, match="events encoded as other, expected mono, libcaer, libcaer_cmp, evt2, evt21, evt3"
    ):
        read(path)
    (tmp_path / "e.db3").write_bytes(b"no data base" * 100)
    with pytest.raises(InputError, match="not a readable rosbag"):
        read(tmp_path / "e.db3")


@pytest.mark.parametrize("seconds", [False, True])
def test_parquet(seconds: bool, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    t = EVENTS.t / 1e6 if seconds else EVENTS.t
    columns = {"timestamp": t, "x": EVENTS.x, "y": EVENTS.y, "polarity": EVENTS.p * 2 - 1, "other": EVENTS.t}
    parquet.write_table(arrow.table(columns), tmp_path / "e.parquet", row_group_size=500)
    assert_same(read(tmp_path / "e.parquet"), EVENTS)
    parquet.write_table(arrow.table({"x": EVENTS.x}), tmp_path / "e.parquet")
    with pytest.raises(InputError, match="expected columns x, y, p and t"):
        read(tmp_path / "e.parquet")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read(tmp_path / "e.parquet")


@pytest.mark.parametrize(
    ("name", "package", "extra", "write"),
    [
        ("e.aedat4", "aedat", "aedat4", lambda path: write_aedat4(path, {0: EVENTS[:9]}, SIZE)),
        ("e.es", "faery", "es", lambda path: write_es(path, EARLIER, SIZE)),
        ("e.h5", "h5py", "hdf5", lambda path: path.write_bytes(b"?")),
        ("e.bag", "rosbags", "rosbag", lambda path: path.write_bytes(b"?")),
        ("e.parquet", "pyarrow", "parquet", lambda path: path.write_bytes(b"?")),
    ],
)
def test_a_missing_package_is_named(
    name: str, package: str, extra: str, write: Callable[[Path], object],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for each in [each for each in sys.modules if each.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, each)
    monkeypatch.setattr(sys, "meta_path", [_Without(package), *sys.meta_path])
    write(tmp_path / name)
    with pytest.raises(MissingDependencyError, match=f"needs the package '{package}'") as error:
        open_events(tmp_path / name)
    assert error.value.hint == f"pip install 'stepcell[{extra}]'"


class _Without:
    """An import finder that finds no package of this name."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] == self._package:
            raise ModuleNotFoundError(name)


def test_a_stream_of_a_format_that_has_one(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("x,y,p,t\n1,2,1,5\n")
    with pytest.raises(UsageError, match="holds one stream"):
        open_events(tmp_path / "e.csv", "0")


def test_older_aedat_names_what_converts_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no event file") as error:
        open_events(tmp_path / "e.aedat")
    assert "DV converts it" in (error.value.hint or "")
