"""Rosbag reader: events in recordings of ROS 1 and ROS 2, through the package rosbags.

rosbags needs no ROS and reads .bag, .db3 and .mcap. The messages are decoded here, from their bytes: an object for each
event is 50 times slower. Types: dvs_msgs/EventArray and prophesee_event_msgs/EventArray (one layout), and
event_camera_msgs/EventPacket with its predecessor event_array_msgs/EventArray.
https://github.com/uzh-rpg/rpg_dvs_ros, https://github.com/ros-event-camera/event_camera_msgs
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from stepcell.optional_imports import require
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.library_reader import choose_stream, read_from, reading
from stepcell.runtime.media.events.ros_messages import DECODERS, PacketDecoder

__all__ = ["RosbagReader", "is_rosbag_folder"]


class RosbagReader:
    """The events of one topic of a recording.

    Args:
        path: a .bag, .db3 or .mcap file, or the folder of a ROS 2 recording.
        file: the same file, open; the package opens it again. None: a folder.
        stream: the topic; None: the only one with events.

    Raises:
        InputError: not such a recording, or without events.
        UsageError: several topics with events, or not the one that was asked for.
        MissingDependencyError: rosbags is not installed.
    """

    def __init__(self, path: Path, file: BinaryIO | None, stream: str | None = None) -> None:
        if file is not None:
            file.close()
        self.name = str(path)
        self._ros1 = path.suffix.lower() == ".bag"
        self.format = "rosbag of ROS 1" if self._ros1 else "rosbag of ROS 2"
        bags = require(f"rosbags.rosbag{1 if self._ros1 else 2}", extra="rosbag", purpose="reading rosbags")
        with reading(self.name, "not a readable rosbag"):
            self._bag = bags.Reader(path)
            self._bag.open()
        try:
            with reading(self.name, "not a readable rosbag"):
                topics = {each.topic: each for each in self._bag.connections if _kind(each) in DECODERS}
            self._topic = topics[choose_stream(self.name, sorted(topics), stream, kind="topic")]
            self._decoder: PacketDecoder = DECODERS[_kind(self._topic)](self.name, ros1=self._ros1)
            self.size = self._first_size()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Events]:
        for message in self._messages():
            yield self._decoder.decode(message)

    def close(self) -> None:
        self._bag.close()

    def _messages(self) -> Iterator[Any]:
        chosen = [each for each in self._bag.connections if each.topic == self._topic.topic]
        for _, _, data in read_from(self._bag.messages(chosen), self.name):
            yield data

    def _first_size(self) -> tuple[int, int] | None:
        first = next(self._messages(), None)
        return None if first is None else self._decoder.size(first)


def is_rosbag_folder(path: Path) -> bool:
    """Whether a folder is a ROS 2 recording."""
    with contextlib.suppress(OSError, ValueError):
        return (path / "metadata.yaml").is_file() and any(
            each.suffix.lower() in (".db3", ".mcap") for each in path.iterdir()
        )
    return False


def _kind(connection: Any) -> str:
    return str(connection.msgtype).replace("/msg/", "/")
