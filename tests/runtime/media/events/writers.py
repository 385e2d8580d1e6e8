"""Writers of event files for tests, from the descriptions of the formats; rosbags serialises its own messages."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell.runtime.media.events import Events
from tests.runtime.media.events.test_evt21 import encode as encode_evt21
from tests.runtime.media.events.test_readers import encode_evt2, encode_evt3

STEP = 700  # events of a packet or message


def write_aedat4(path: Path, streams: dict[int, Events], size: tuple[int, int]) -> Path:
    """Uncompressed, without a table at the end: an IOHeader, then packets of stream, length and FlatBuffer."""
    flatbuffers = pytest.importorskip("flatbuffers")
    nodes = "".join(
        f'<node name="{number}"><attr key="typeIdentifier" type="string">EVTS</attr><node name="info">'
        f'<attr key="sizeX" type="int">{size[0]}</attr><attr key="sizeY" type="int">{size[1]}</attr></node></node>'
        for number in streams
    )
    builder = flatbuffers.Builder(0)
    text = builder.CreateString(f'<dv version="2.0"><node name="outInfo">{nodes}</node></dv>')
    builder.StartObject(3)
    builder.PrependInt64Slot(1, -1, 0)  # where the table at the end is
    builder.PrependUOffsetTRelativeSlot(2, text, 0)
    builder.FinishSizePrefixed(builder.EndObject(), b"IOHE")
    data = b"#!AER-DAT4.0\r\n" + bytes(builder.Output())
    for number, events in streams.items():
        for start in range(0, len(events), STEP):
            part = events[start : start + STEP]
            records = np.zeros(len(part), [("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("on", "?"), ("", "V3")])
            for name, column in zip(("t", "x", "y", "on"), "txyp", strict=True):
                records[name] = getattr(part, column)
            builder = flatbuffers.Builder(0)
            builder.StartVector(16, len(part), 8)
            builder.head -= 16 * len(part)
            builder.Bytes[builder.head : builder.head + 16 * len(part)] = records.tobytes()
            vector = builder.EndVector()
            builder.StartObject(1)
            builder.PrependUOffsetTRelativeSlot(0, vector, 0)
            builder.FinishSizePrefixed(builder.EndObject(), b"EVTS")
            packet = bytes(builder.Output())
            data += struct.pack("<ii", number, len(packet)) + packet
    path.write_bytes(data)
    return path


def write_es(path: Path, events: Events, size: tuple[int, int]) -> Path:
    """Version 2.0.0: a byte of time and polarity, 254 overflows of 127 us; y from the lower edge."""
    data = bytearray(b"Event Stream\x02\x00\x00\x01" + struct.pack("<HH", *size))
    last = 0
    for x, y, p, t in zip(*(getattr(events, name).tolist() for name in "xypt"), strict=True):
        data += b"\xff" * ((t - last) // 127)
        data.append((t - last) % 127 << 1 | int(p))
        data += struct.pack("<HH", x, size[1] - 1 - y)
        last = t
    path.write_bytes(data)
    return path


_PACKET = (
    "std_msgs/Header header\nuint32 height\nuint32 width\nuint64 seq\nuint64 time_base\nstring encoding\n"
    "bool is_bigendian\nuint8[] events\n"
)
_TYPES = {
    "dvs_msgs/msg/Event": "uint16 x\nuint16 y\n{time} ts\nbool polarity\n",
    "dvs_msgs/msg/EventArray": "std_msgs/Header header\nuint32 height\nuint32 width\ndvs_msgs/Event[] events\n",
    "event_camera_msgs/msg/EventPacket": _PACKET,
}


def write_rosbag(path: Path, topics: dict[str, Events], size: tuple[int, int], kind: str) -> Path:
    """A .bag of ROS 1, or the folder of ROS 2; `kind` is dvs_msgs or an encoding of event_camera_msgs."""
    from rosbags import rosbag1, rosbag2
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    ros1 = path.suffix == ".bag"
    store = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_HUMBLE)
    for name, text in _TYPES.items():
        store.register(get_types_from_msg(text.format(time="time" if ros1 else "builtin_interfaces/Time"), name))
    message = "dvs_msgs/msg/EventArray" if kind == "dvs_msgs" else "event_camera_msgs/msg/EventPacket"
    serialise = store.serialize_ros1 if ros1 else store.serialize_cdr
    with rosbag1.Writer(path) if ros1 else rosbag2.Writer(path, version=8) as bag:
        for topic, events in topics.items():
            connection = bag.add_connection(topic, message, typestore=store)
            for number, made in enumerate(_messages(store.types, events, size, kind, ros1=ros1)):
                bag.write(connection, number, serialise(made, message))
    return path


def _messages(types: Any, events: Events, size: tuple[int, int], kind: str, *, ros1: bool) -> list[Any]:
    time = types["builtin_interfaces/msg/Time"]
    seq = {"seq": 0} if ros1 else {}
    header = types["std_msgs/msg/Header"](**seq, stamp=time(sec=1, nanosec=2), frame_id="camera")
    fields = {"header": header, "height": size[1], "width": size[0]}
    if kind == "dvs_msgs":
        event = types["dvs_msgs/msg/Event"]
        rows = zip(*(getattr(events, name).tolist() for name in "xypt"), strict=True)
        made = [
            event(x=x, y=y, polarity=p, ts=time(sec=t // 1_000_000, nanosec=t % 1_000_000 * 1000))
            for x, y, p, t in rows
        ]
        cuts = [0, 1, 3, *range(5, len(made), STEP), len(made)]  # messages of one event and of two
        array = types["dvs_msgs/msg/EventArray"]
        return [array(**fields, events=made[a:b]) for a, b in pairwise(cuts)] + [array(**fields, events=[])]
    packet = types["event_camera_msgs/msg/EventPacket"]
    fields.update(encoding=kind, is_bigendian=False)
    return [
        packet(**fields, seq=number, time_base=base, events=np.frombuffer(part, np.uint8).copy())
        for number, (base, part) in enumerate(_encoded(events, kind))
    ]


def _encoded(events: Events, kind: str) -> list[tuple[int, bytes]]:
    """Of each message the time base in nanoseconds, and the bytes."""
    x, y, p, t = (getattr(events, name).astype(np.uint64) for name in "xypt")
    if kind == "mono":  # a message spans 4 s at most
        cuts = [slice(start, start + 200) for start in range(0, len(t), 200)]
        words = p << 63 | y << 48 | x << 32
        return [(int(t[cut][0]) * 1000, (words[cut] | (t[cut] - t[cut][0]) * 1000).tobytes()) for cut in cuts]
    if kind == "libcaer":
        records = np.stack([x << 17 | y << 2 | p << 1 | 1, t - t[0]], 1).astype("<u4")
        cuts = [slice(start, start + STEP) for start in range(0, len(t), STEP)]
        return [(int(t[0]) * 1000, records[cut].tobytes()) for cut in cuts]
    if kind == "libcaer_cmp":
        return list(_libcaer_cmp(events))
    encoders = {"evt2": encode_evt2, "evt3": encode_evt3}
    data = encode_evt21(events, legacy=False) if kind == "evt21" else encoders.get(kind, encode_evt2)(events).tobytes()
    return [(0, data[start : start + 8 * STEP]) for start in range(0, len(data), 8 * STEP)]


def _libcaer_cmp(events: Events) -> Iterator[tuple[int, bytes]]:
    """Time base in microseconds; the column of the last event of a message goes on in the next one."""
    column = -1
    for start in range(0, len(events), STEP):
        part = events[start : start + STEP]
        base, time, words = int(part.t[0]), 0, []
        for x, y, p, t in zip(*(getattr(part, name).tolist() for name in "xypt"), strict=True):
            if t - base != time:
                high, low = (t - base) >> 12, (t - base) & 0xFFF
                words += [high] if high != time >> 12 else []
                words += [1 << 12 | low] if low != time & 0xFFF else []
                time = t - base
            words += [2 << 12 | x] if x != column else []
            column = x
            words.append(3 << 12 | int(p) << 11 | y)
        yield base, np.array(words, "<u2").tobytes()
