"""Messages of events in ROS 1 and ROS 2, decoded from their bytes.

ROS 1 packs the fields; ROS 2 (CDR) aligns each to its size, from the fourth byte of a message on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.evt2 import Evt2
from stepcell.runtime.media.events.evt3 import Evt3
from stepcell.runtime.media.events.evt21 import Evt21
from stepcell.runtime.media.events.libcaer_cmp import LibcaerCmp
from stepcell.runtime.media.events.reader import unwrap_counter

__all__ = ["DECODERS", "PacketDecoder"]

_PACKED = np.dtype([("x", "<u2"), ("y", "<u2"), ("sec", "<u4"), ("nsec", "<u4"), ("p", "u1")])
# In CDR the first event lacks the two bytes that the others have before `sec`.
_ALIGNED = np.dtype(
    {
        "names": ["x", "y", "sec", "nsec", "p"],
        "formats": ["<u2", "<u2", "<u4", "<u4", "u1"],
        "offsets": [0, 2, 6, 10, 14],
        "itemsize": 16,
    }
)


class PacketDecoder(Protocol):
    """Decodes the messages of one topic, in their order."""

    def size(self, message: Any) -> tuple[int, int] | None: ...

    def decode(self, message: Any) -> Events: ...


class _Fields:
    """Reads the fields of a message one after the other."""

    def __init__(self, name: str, message: Any, *, ros1: bool) -> None:
        self._name, self._data, self._ros1 = name, memoryview(message), ros1
        self._start = 0 if ros1 else 4
        if not ros1 and bytes(self._data[:2]) not in (b"\x00\x01", b"\x00\x03"):
            raise InputError(f"{name}: a message that is not little-endian CDR: {bytes(self._data[:4]).hex()}")
        self.at = self._start

    def number(self, kind: str) -> int:
        width = struct.calcsize("<" + kind)
        if not self._ros1:
            self.at += (self._start - self.at) % width
        return int(struct.unpack("<" + kind, self.bytes(width))[0])

    def bytes(self, count: int) -> memoryview:
        if self.at + count > len(self._data):
            raise InputError(f"{self._name}: a message of {len(self._data)} bytes ends inside a field")
        self.at += count
        return self._data[self.at - count : self.at]

    def text(self) -> str:
        return bytes(self.bytes(self.number("I"))).rstrip(b"\0").decode("latin-1")

    def header(self) -> tuple[int, int]:
        """Skip the header; (width, height), which follow it."""
        if self._ros1:
            self.number("I")
        self.number("I"), self.number("I"), self.text()
        height, width = self.number("I"), self.number("I")
        return width, height


class EventArray:
    """dvs_msgs/EventArray: x, y, time of day and polarity of each event."""

    def __init__(self, name: str, *, ros1: bool) -> None:
        self._name, self._ros1 = name, ros1

    def size(self, message: Any) -> tuple[int, int] | None:
        found = _Fields(self._name, message, ros1=self._ros1).header()
        return found if all(found) else None

    def decode(self, message: Any) -> Events:
        fields = _Fields(self._name, message, ros1=self._ros1)
        fields.header()
        count = fields.number("I")
        if self._ros1:
            records = np.frombuffer(fields.bytes(count * _PACKED.itemsize), _PACKED)
        elif count:
            # moved two bytes, so that the first event is laid out as the others
            first, rest = bytes(fields.bytes(4)), bytes(fields.bytes(9 + (count - 1) * 16))
            records = np.frombuffer((first + b"\0\0" + rest).ljust(count * 16, b"\0"), _ALIGNED)
        else:
            records = np.empty(0, _ALIGNED)
        t = records["sec"].astype(np.int64) * 1_000_000 + records["nsec"] // 1000
        return Events.of(records["x"], records["y"], records["p"], t)


class EventPacket:
    """event_camera_msgs/EventPacket: events as the camera's driver encoded them."""

    def __init__(self, name: str, *, ros1: bool) -> None:
        self._name, self._ros1 = name, ros1
        self._decoder: Evt2 | Evt21 | Evt3 | None = None
        self._compressed = LibcaerCmp()
        self._encoding: str | None = None

    def size(self, message: Any) -> tuple[int, int] | None:
        found = _Fields(self._name, message, ros1=self._ros1).header()
        return found if all(found) else None

    def decode(self, message: Any) -> Events:
        fields = _Fields(self._name, message, ros1=self._ros1)
        fields.header()
        fields.number("Q")  # number of the message
        base, encoding, big = fields.number("Q"), fields.text(), fields.number("B")
        data = fields.bytes(fields.number("I"))
        if big:
            raise InputError(f"{self._name}: its events are big-endian, expected little-endian")
        if self._encoding not in (None, encoding):
            raise InputError(f"{self._name}: its encoding changes from {self._encoding} to {encoding}")
        self._encoding = encoding
        if encoding == "mono":
            return _mono(np.frombuffer(data, "<u8", len(data) // 8), base)
        if encoding == "libcaer":
            return _libcaer(np.frombuffer(data, "<u4", len(data) // 8 * 2), base)
        if encoding == "libcaer_cmp":
            return self._compressed.decode(np.frombuffer(data, "<u2", len(data) // 2), base)
        if self._decoder is None:
            if encoding not in _ENCODINGS:
                known = ", ".join(("mono", "libcaer", "libcaer_cmp", *_ENCODINGS))
                raise InputError(
                    f"{self._name}: events encoded as {encoding}, expected {known}",
                    hint="event_camera_tools converts a recording to dvs_msgs",
                )
            self._decoder = _ENCODINGS[encoding]()
        word = self._decoder.word
        return self._decoder.decode(np.frombuffer(data, word, len(data) // word.itemsize))


def _mono(words: NDArray[np.uint64], base: int) -> Events:
    t = (base + (words & 0xFFFFFFFF).astype(np.int64)) // 1000
    return Events.of(words >> 32 & 0xFFFF, words >> 48 & 0x7FFF, words >> 63, t)


def _libcaer(words: NDArray[np.uint32], base: int) -> Events:
    """Events of iniVation's libcaer (polarity.h): microseconds that wrap after 2 ** 31 within a message."""
    event, low = words[::2], unwrap_counter(words[1::2].astype(np.int64), 1 << 31, None)
    return Events.of(event >> 17 & 0x7FFF, event >> 2 & 0x7FFF, event >> 1 & 1, base // 1000 + low)


_ENCODINGS: dict[str, Callable[[], Evt2 | Evt21 | Evt3]] = {
    "evt2": Evt2,
    "evt21": lambda: Evt21(legacy=False),
    "evt3": Evt3,
}

DECODERS: dict[str, Callable[..., PacketDecoder]] = {
    "dvs_msgs/EventArray": EventArray,
    "prophesee_event_msgs/EventArray": EventArray,
    "event_array_msgs/EventArray": EventPacket,
    "event_camera_msgs/EventPacket": EventPacket,
}
