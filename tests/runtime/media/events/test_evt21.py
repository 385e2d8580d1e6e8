"""EVT 2.1: vectors of 32 pixels, in both orders of the halves of a word."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from stepcell.errors import InputError
from stepcell.runtime.media.events import Events
from stepcell.runtime.media.events.compiled import compiled_loops
from stepcell.runtime.media.events.evt21 import Evt21
from tests.runtime.media.events.files import read, some_events, write_raw


def encode(events: Events, *, legacy: bool) -> bytes:
    """Words of the documented fields: neighbours of one row, time and polarity share a word."""
    words: list[tuple[int, int]] = []
    high: int | None = None
    rows = list(zip(*(getattr(events, name).tolist() for name in "xypt"), strict=True))
    at = 0
    while at < len(rows):
        x, y, p, t = rows[at]
        if high != t >> 6:
            high = t >> 6
            words.append((8 << 28 | high & 0xFFFFFFF, 0))
        valid = 0
        while at < len(rows) and rows[at][1:] == (y, p, t) and 0 <= rows[at][0] - x < 32:
            if valid >> (rows[at][0] - x):
                break  # the pixels of a word increase
            valid |= 1 << (rows[at][0] - x)
            at += 1
        words.append((int(p) << 28 | (t & 63) << 22 | x << 11 | y, valid))
    pack = struct.Struct("<II")
    return b"".join(pack.pack(*(word if legacy else word[::-1])) for word in words)


@pytest.mark.parametrize("legacy", [False, True])
def test_by_hand(legacy: bool) -> None:
    words = [
        (1 << 28 | 1 << 11, 1),  # before the first time word: skipped
        (8 << 28 | 2, 0xFFFF),  # 2 * 64 us; the lower half is unused
        (1 << 28 | 5 << 22 | 96 << 11 | 200, 1 | 1 << 7 | 1 << 31),
        (10 << 28, 0xFFFF),  # a trigger
        (0 << 28 | 63 << 22 | 2016 << 11 | 2047, 1 << 31),
        (0 << 28 | 63 << 22, 0),  # no pixel
        (14 << 28, 3),
    ]
    data = b"".join(struct.pack("<II", *(word if legacy else word[::-1])) for word in words)
    decoder = Evt21(legacy=legacy)
    events = decoder.decode(np.frombuffer(data, decoder.word))
    assert events.x.tolist() == [96, 103, 127, 2047]
    assert events.y.tolist() == [200, 200, 200, 2047]
    assert events.p.tolist() == [True, True, True, False]
    assert events.t.tolist() == [133, 133, 133, 191]


@pytest.mark.parametrize(
    ("lines", "legacy"),
    [
        (["format EVT21;height=480;width=640;endianness=little"], False),
        (["format EVT21;height=480;width=640;endianness=legacy"], True),
        (["evt 2.1", "geometry 640x480", "endianness legacy"], True),
        (["evt 2.1", "geometry 640x480", "system_ID 49", "integrator_name Prophesee"], True),
        (["evt 2.1", "geometry 640x480", "system_ID 49", "integrator_name Other"], False),
        (["evt 2.1", "geometry 640x480", "system_ID 64"], False),
        (["evt 2.1", "geometry 640x480"], False),
    ],
)
def test_the_header_says_the_order(lines: list[str], legacy: bool, tmp_path: Path) -> None:
    events = some_events(2000)
    order = np.lexsort((events.x, events.p, events.y, events.t))
    events = Events(*(getattr(events, name)[order] for name in "xypt"))
    path = write_raw(tmp_path / "e.raw", np.frombuffer(encode(events, legacy=legacy), "<u8"), *lines)
    got = read(path)
    assert all(np.array_equal(getattr(got, name), getattr(events, name)) for name in "xypt")


@pytest.mark.parametrize("legacy", [False, True])
def test_in_parts_of_any_length(legacy: bool) -> None:
    events = some_events(2000, span=1 << 37)  # the time wraps after 2 ** 34 us
    data = encode(events, legacy=legacy)
    decoder = Evt21(legacy=legacy)
    words = np.frombuffer(data, decoder.word)
    cuts = np.unique(np.random.default_rng(0).integers(1, len(words), 50))
    got = Events.join([decoder.decode(part) for part in np.split(words, cuts)])
    assert np.array_equal(got.t - got.t[0], events.t - events.t[0])
    assert np.array_equal(got.x, events.x)


@pytest.mark.parametrize(
    "line", ["format EVT4;height=720;width=1280", "format EVT21;endianness=big", "format HISTO3D;width=320;height=320"]
)
def test_other_encodings_name_what_converts_them(line: str, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "e.raw", np.zeros(8, "<u8"), line)
    with pytest.raises(InputError, match=line.removeprefix("format ").partition(";")[0]) as error:
        read(path)
    assert f"metavision_file_to_dat -i {path}" in (error.value.hint or "")


def test_compiled_loops_give_the_same() -> None:
    """Words of every type, some without a time at the beginning, in parts."""
    loops = compiled_loops()
    if loops is None:
        pytest.skip("numba is not installed")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        one, other = Evt21(legacy=False), Evt21(legacy=False)
        for _ in range(3):
            words = np.empty(500, one.word)
            kinds = rng.choice([0, 1, 10, 15] if seed % 4 == 0 else [0, 1, 8, 8, 10], len(words))
            words["head"] = kinds << 28 | rng.integers(0, 1 << 28, len(words))
            words["valid"] = rng.integers(0, 1 << 32, len(words)) & rng.integers(0, 1 << 32, len(words))
            got, wanted = one._decode_compiled(loops, words), other._decode(words)
            for name in "xypt":
                assert getattr(got, name).dtype == getattr(wanted, name).dtype
                assert np.array_equal(getattr(got, name), getattr(wanted, name)), (seed, name)
            assert one._high == other._high
