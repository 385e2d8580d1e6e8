"""Orientation: all eight, in videos and in every kind of still picture."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.orientation import Orientation
from tests.runtime.media.clips import marked, write_clip

# What FFmpeg's own player shows, from a comparison of every kind of file with `ffmpeg -autorotate` 9.0.2: the tag
# of EXIF, the display matrix (a, b, c, d), and the same in NumPy.
SHOWN: dict[int, tuple[tuple[int, int, int, int], Callable[[NDArray[np.uint8]], NDArray[np.uint8]]]] = {
    1: ((1, 0, 0, 1), lambda a: a),
    2: ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
    3: ((-1, 0, 0, -1), lambda a: a[::-1, ::-1]),
    4: ((1, 0, 0, -1), lambda a: a[::-1]),
    5: ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
    6: ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
    7: ((0, -1, -1, 0), lambda a: a[::-1, ::-1].swapaxes(0, 1)),
    8: ((0, -1, 1, 0), lambda a: np.rot90(a)),
}
KINDS = pytest.mark.parametrize("number", SHOWN)


def assert_shown(path: Path, number: int) -> None:
    (frame,) = list(open_source(str(path)))[:1]
    expected = SHOWN[number][1](marked())
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 4


@KINDS
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_display_matrix(number: int, suffix: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / f"clip{suffix}", [marked()] * 2)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    at += 52 if data[at] else 40
    a, b, c, d = (each << 16 for each in SHOWN[number][0])
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    assert_shown(path, number)


def exif(number: int, order: str) -> bytes:
    return {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIHHHIHHI", 42, 8, 1, 0x112, 3, 1, number, 0, 0)


def still(codec: str, pixels: str) -> bytes:
    context = av.CodecContext.create(codec, "w")
    context.height, context.width, context.pix_fmt, context.time_base = 48, 64, pixels, Fraction(1, 25)
    if codec == "mjpeg":
        context.color_range = 2
    frame = av.VideoFrame.from_ndarray(marked(), "rgb24").reformat(format=pixels)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def jpeg(block: bytes) -> bytes:
    data = still("mjpeg", "yuvj444p")
    segment = b"Exif\0\0" + block
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def png(block: bytes) -> bytes:
    data = still("png", "rgb24")
    chunk = b"eXIf" + block
    return data[:33] + struct.pack(">I", len(block)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def webp(block: bytes) -> bytes:
    if "libwebp" not in av.codecs_available:
        pytest.skip("FFmpeg has no WebP encoder here")
    data = still("libwebp", "yuv420p")[12:]
    header = b"VP8X" + struct.pack("<IB3x", 10, 8) + struct.pack("<I", 63)[:3] + struct.pack("<I", 47)[:3]
    chunks = b"WEBP" + header + data + b"EXIF" + struct.pack("<I", len(block)) + block + b"\0" * (len(block) % 2)
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


@KINDS
@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("make", [jpeg, png, webp])
def test_exif(number: int, order: str, make: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / f"photo.{make.__name__}"
    path.write_bytes(make(exif(number, order)))
    assert_shown(path, number)


@KINDS
def test_tiff(number: int, tmp_path: Path) -> None:
    """The encoder writes no orientation, so its directory is copied to the end with one more entry."""
    data = still("tiff", "rgb24")
    data += b"\0" * (len(data) % 2)
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    entries = [data[at + 2 + 12 * entry :][:12] for entry in range(count)]
    entries.append(struct.pack("<HHIHH", 0x112, 3, 1, number, 0))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    directory = struct.pack("<H", count + 1) + b"".join(entries) + bytes(4)
    path = tmp_path / "photo.tif"
    path.write_bytes(data[:4] + struct.pack("<I", len(data)) + data[8:] + directory)
    assert_shown(path, number)


@pytest.mark.parametrize("cut", [3, 20, 30, 60])
def test_exif_that_is_cut_off_is_no_orientation(cut: int, tmp_path: Path) -> None:
    """The picture is shown as it is stored, or refused as a picture, but never ends in a Python error."""
    data = jpeg(exif(6, "<"))
    end = data.index(b"Exif") + 6 + 26
    path = tmp_path / "photo.jpg"
    segment = data[: end - 26 + min(cut, 26)]
    path.write_bytes(segment[:4] + struct.pack(">H", len(segment) - 4) + segment[6:] + data[end:])
    frames = list(open_source(str(path)))
    assert len(frames) == 1


def test_an_angle_between_quarter_turns_is_rounded() -> None:
    assert Orientation.of_matrix(60000, 20000, -20000, 60000) == Orientation()
    assert Orientation.of_matrix(20000, 60000, -60000, 20000) == Orientation.of_exif(6)
    assert Orientation.of_exif(99) == Orientation()
