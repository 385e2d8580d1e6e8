"""Raw frames on byte streams."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell.errors import InputError, OutputError
from stepcell.runtime.media.raw_frames import RawSink, RawSource
from tests.runtime.media.frames import noise, write_all


@pytest.mark.parametrize("channels", [1, 3])
def test_raw_frames(channels: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 4, 6, channels), np.uint8)
    np.testing.assert_array_equal(list(RawSource(io.BytesIO(frames.tobytes()), (6, 4), channels)), frames)


def test_raw_stream_that_ends_inside_a_frame() -> None:
    source = iter(RawSource(io.BytesIO(bytes(100)), (6, 4), 3))
    next(source)
    with pytest.raises(InputError, match="ended inside frame 1: 28 of 72 bytes"):
        next(source)


class Failing(io.RawIOBase):
    """A pipe whose reads fail."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raise OSError(5, "Input/output error")


def test_a_pipe_that_breaks() -> None:
    with pytest.raises(InputError, match=r"stdin: cannot be read \(Input/output error\)"):
        list(RawSource(io.BufferedReader(Failing()), (2, 2), 3))


def test_raw_frames_are_exact() -> None:
    stream = io.BytesIO()
    frames = noise(3, 4, 6, 3)
    write_all(RawSink(stream), frames)
    assert stream.getvalue() == frames.tobytes()


def test_full_disk_is_an_output_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "wb", buffering=0) as stream, pytest.raises(OutputError, match="No space left"):  # noqa: PTH123
        RawSink(stream).write(noise(1, 4, 4, 3)[0])  # type: ignore[arg-type]
