"""Frames and files that the tests of several formats share."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.media.sink import Sink


def noise(count: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


def write_all(sink: Sink, frames: NDArray[np.uint8]) -> None:
    for frame in frames:
        sink.write(frame)
    sink.close()


def remux(clip: Path, path: Path, **options: str) -> bytes:
    """The same packets in a new file."""
    with av.open(str(clip)) as source, av.open(str(path), "w", options=options) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    return path.read_bytes()
