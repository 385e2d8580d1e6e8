"""Text, structured .npy and N-MNIST, which need numpy only. Files are written here, as their descriptions say."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stepcell.errors import InputError
from stepcell.runtime.media.events import Events
from stepcell.runtime.media.events.formats import open_events
from tests.runtime.media.events.files import SIZE, assert_same, read, sensor, some_events

EVENTS = some_events(3000)


def write_text(path: Path, events: Events, line: str, *head: str) -> Path:
    """`line` is a format of x, y, p and t; `s` is t in seconds, `m` polarity as -1 and 1, `b` as a boolean."""
    rows = zip(*(getattr(events, name).tolist() for name in "xypt"), strict=True)
    lines = [line.format(x=x, y=y, p=int(p), m=2 * p - 1, b=bool(p), t=t, s=t / 1e6) for x, y, p, t in rows]
    path.write_text("\n".join([*head, *lines, ""]))
    return path


@pytest.mark.parametrize(
    ("name", "line", "head", "size"),
    [
        ("e.txt", "{s:.6f} {x} {y} {p}", ["640 480"], SIZE),  # E2VID
        ("e.txt", "{s:.9f} {x} {y} {p}", [], None),  # Mueggler et al. 2017
        ("e.csv", "{x},{y},{p},{t}", [], None),  # metavision_file_to_csv
        ("e.csv", "{x},{y},{p},{t}", ["%geometry:640,480"], SIZE),
        ("e.CSV", "{t};{p};{y};{x}", ["t;p;y;x"], None),
        ("e.csv", "{t}, {x}, {y}, {m}", ["timestamp, x, y, polarity"], None),
        ("e.txt", "{t}\t{x}\t{y}\t{m}", ["# t x y p", "", "# 2020"], None),
        ("e.csv", "7,{x},{y},{p},{t}", ["\ufeffcamera,x,y,p,t"], None),
        ("e.csv", "7,{x},{y},{p},{t}", [",x,y,p,t"], None),  # pandas
        ("e.csv", "{t},{x},{y},{b}", ["t,x,y,p"], None),  # pandas, booleans
        ("e.csv", "{t},{x},{y},{b}", [], None),
        ("e.csv", "7,{x},{y},{p},{t}", ['"","x","y","p","t"'], None),  # R
    ],
)
def test_text(name: str, line: str, head: list[str], size: tuple[int, int] | None, tmp_path: Path) -> None:
    path = write_text(tmp_path / name, EVENTS, line, *head)
    assert_same(read(path), EVENTS)
    assert sensor(path) == size


@pytest.mark.parametrize("head", [[], ["t x y p"]])
def test_seconds_whose_first_is_written_as_an_integer(head: list[str], tmp_path: Path) -> None:
    path = write_text(tmp_path / "e.txt", EVENTS, "{s:.9g} {x} {y} {p}", *head, "0 5 6 1", "0 7 6 1")
    found = read(path)
    assert found.t[:2].tolist() == [0, 0]
    assert_same(found[2:], EVENTS)


def test_the_order_that_values_show_is_told(tmp_path: Path) -> None:
    def told(line: str, *head: str) -> str:
        with contextlib.closing(open_events(write_text(tmp_path / "e.csv", EVENTS, line, *head))) as reader:
            return reader.format

    assert told("{x},{y},{p},{t}") == "text, read as x y p t"
    assert told("{t},{x},{y},{p}") == "text, read as t x y p"
    assert told("{t},{x},{y},{p}", "t,x,y,p") == "text"


def test_text_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepcell.runtime.media.events.text._PART", 7)
    assert_same(read(write_text(tmp_path / "e.csv", EVENTS, "{x},{y},{p},{t}")), EVENTS)


def test_text_in_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepcell.runtime.media.events.text._PART", 100)
    write_text(tmp_path / "events.txt", EVENTS, "{s:.6f} {x} {y} {p}", "640 480")
    with zipfile.ZipFile(tmp_path / "e.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "events.txt", "data/events.txt")
        archive.writestr("data/README", "about")
    assert_same(read(tmp_path / "e.zip"), EVENTS)
    whole = (tmp_path / "e.zip").read_bytes()
    middle = len(whole) // 2
    (tmp_path / "e.zip").write_bytes(whole[:middle] + bytes(50) + whole[middle + 50 :])
    with pytest.raises(InputError, match=r"e\.zip"):
        read(tmp_path / "e.zip")
    with zipfile.ZipFile(tmp_path / "e.zip", "a") as archive:
        archive.writestr("more.csv", "x,y,p,t")
    with pytest.raises(InputError, match=r"expected one .txt or .csv in it, got 2"):
        read(tmp_path / "e.zip")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 1 1 1\n2 1 0 1\n", "do not show which column"),  # both orders are possible
        ("1 2 3 4\n2 3 4 5\n", "do not show which column"),  # none is
        ("1 2 3 0 9\n", "do not show which column"),
        ("1,2\n3,4\n", "contains no event"),
        ("hello world\n", "got 'hello world'"),
        ("x,y,p\n1,2,1\n", "got 'x,y,p'"),
        ("x,y,p,t,u\n1,2,1,5\n", "5 names of columns, 4 in"),
        ("x,y,p,t\n1,2,1,5\n1,2,1,nan\n", "event 1: expected 4 numbers, got '1,2,1,nan'"),
        ("x,y,p,t\n1,2,1,5\n1,2,1\n", "event 1: expected 4 numbers"),
        ("x,y,p,t\n1,2,1,5\n1,2,1,5,6\n", "event 1: expected 4 numbers"),
        ("x,y,p,t\n1,2,1,5\n1,2,7,6\n", "event 1: p: expected 0 and 1"),
        ("x,y,p,t\n1,2,1,5\n1.5,2,1,6\n", "event 1: x: expected a pixel"),
        ("x,y,p,t\n1,2,1,5\n-1,2,1,6\n", r"event 1 at \(-1, 2\), 6 us: outside"),
        ("x,y,p,t\n1,2,1,5\n1,2\r,1,6\n", "event 1: expected 4 numbers"),
        ("x,y,p,t\n" + "1,2,1,5\n" * 1001 + "1,2,1,6.5\n", r"event 1001: expected whole .*, got '1,2,1,6.5'"),
        ("x,y,p,t\n1,2,1,5\n1,2,1,1700000000000000000\n", r"event 1: expected whole microseconds below 2\^53"),
        ("", "contains no event"),
        ("\n" * 200, "100 lines without an event"),
    ],
)
def test_text_that_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_bytes(text.encode())
    with pytest.raises(InputError, match=message):
        read(tmp_path / "e.csv")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_bytes(bytes(range(256)) * 100)
    with pytest.raises(InputError):
        read(tmp_path / "e.txt")


NAMES = [("x", "y", "p", "t"), ("x", "y", "polarity", "timestamp"), ("x", "y", "on", "t")]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("dtypes", [("<u2", "<u2", "u1", "<i8"), ("<i4", ">i2", "?", "<f8"), ("f4", "f4", "i1", "<u4")])
def test_structured_npy(names: tuple[str, ...], dtypes: tuple[str, ...], tmp_path: Path) -> None:
    table = np.empty(len(EVENTS), list(zip(names, dtypes, strict=True))[::-1])
    for name, column in zip(names, "xypt", strict=True):
        table[name] = getattr(EVENTS, column)
    if dtypes[3] == "<f8":
        table[names[3]] /= 1e6
    if dtypes[2] == "i1":
        table[names[2]] = table[names[2]] * 2 - 1
    np.save(tmp_path / "e.npy", table)
    assert_same(read(tmp_path / "e.npy"), EVENTS)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: np.save(path, np.zeros((5, 4))), r"structured array \(N,\) with the fields x, y, p and t"),
        (lambda path: np.save(path, np.zeros(5, [("t", "u8"), ("x", "f4"), ("y", "f4"), ("w", "f4")])), "the fields"),
        (lambda path: np.save(path, np.array([{}])), "the fields"),
        (lambda path: path.write_bytes(b"no array"), "not a readable .npy"),
    ],
)
def test_npy_of_something_else(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write(tmp_path / "e.npy")
    with pytest.raises(InputError, match=message):
        read(tmp_path / "e.npy")


def test_a_truncated_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.zeros(100, [("x", "u2"), ("y", "u2"), ("p", "?"), ("t", "u8")]))
    whole = (tmp_path / "e.npy").read_bytes()
    for cut, message in ((13, "truncated: 99 of 100 events"), (5, "truncated: ends 8 bytes into a record of 13")):
        (tmp_path / "e.npy").write_bytes(whole[:-cut])
        with pytest.raises(InputError, match=message):
            read(tmp_path / "e.npy")


def test_n_mnist(tmp_path: Path) -> None:
    records = [
        (3, 33, 1, 0x00_01_02),
        (33, 0, 0, 0x7F_FF_FF),
        (0, 240, 0, 0),  # no event: time goes on by 2 ** 13 us
        (5, 6, 1, 0x7F_FF_FF),
    ]
    data = b"".join(bytes([x, y]) + (p << 23 | t).to_bytes(3, "big") for x, y, p, t in records)
    (tmp_path / "00002.bin").write_bytes(data)
    events = read(tmp_path / "00002.bin")
    assert [getattr(events, name).tolist() for name in "xypt"] == [
        [3, 33, 5],
        [33, 0, 6],
        [True, False, True],
        [0x0102, 0x7FFFFF, 0x7FFFFF + 8192],
    ]
    (tmp_path / "00002.bin").write_bytes(data[:-1])
    with pytest.raises(InputError, match="truncated: ends 4 bytes into a record of 5"):
        read(tmp_path / "00002.bin")
