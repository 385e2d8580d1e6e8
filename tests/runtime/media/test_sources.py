"""Sources: frames of real files, and broken files of every kind."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stepcell.errors import InputError, StepcellError
from stepcell.runtime.media.npy_file import ArraySource
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.picture_folder import FolderSource, natural_key
from stepcell.runtime.media.raw_frames import RawSource
from stepcell.runtime.media.source import display_name
from stepcell.runtime.media.video_reader import VideoSource

WIDTH, HEIGHT = 176, 144


def write_picture(path: Path, pixels: NDArray[np.uint8], pix_fmt: str = "rgb24") -> None:
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = pixels.shape[:2]
    codec.pix_fmt, codec.time_base, codec.thread_count = pix_fmt, Fraction(1), 1
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(map(bytes, codec.encode(av.VideoFrame.from_ndarray(pixels, pix_fmt)))))


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


def test_video_equals_plain_decoding(clip_path: Path) -> None:
    source = open_source(str(clip_path))
    assert (source.length, source.fps) == (120, pytest.approx(29.97, abs=0.01))
    frames = list(source)
    source.close()
    with av.open(str(clip_path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_array_equal(frames, expected)
    assert np.stack(frames).shape == (120, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("count", [1, 3])
def test_the_last_frame_may_be_shown_for_long(count: int, tmp_path: Path) -> None:
    """A file of one frame per five seconds is complete, although its last timestamp is five seconds before its end."""
    path = tmp_path / "slow.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(1, 5))
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for _ in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    assert len(list(open_source(str(path)))) == count


@pytest.mark.parametrize("rate", [Fraction(200_000), Fraction(1, 100_000)], ids=str)
def test_a_rate_that_is_none(rate: Fraction, tmp_path: Path) -> None:
    path = tmp_path / "odd.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    source = open_source(str(path))
    assert source.fps is None
    assert len(list(source)) == 3


def test_a_title_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "titled.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "caf\xe9"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace("caf\xe9".encode(), b"caf\xe9\xe9"))  # invalid UTF-8
    assert len(list(open_source(str(path)))) == 1


def test_video_through_a_named_pipe(clip_path: Path, tmp_path: Path) -> None:
    data = remux(clip_path, tmp_path / "clip.ts")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = threading.Thread(target=pipe.write_bytes, args=(data,), daemon=True)
    thread.start()
    source = open_source(str(pipe))
    assert len(list(source)) == 120
    source.close()
    thread.join(10)


def test_file_name_with_a_colon(clip_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "at 12:30.mp4"
    path.write_bytes(clip_path.read_bytes())
    assert len(list(open_source(str(path)))) == 120


def test_sideways_phone_clip_is_turned_upright(clip_path: Path, tmp_path: Path) -> None:
    """The rotation is in the track header: a 3x3 matrix of 16.16 numbers, here 90 degrees clockwise."""
    data = bytearray(remux(clip_path, tmp_path / "plain.mp4"))
    one, minus = (0x10000).to_bytes(4, "big"), (-0x10000).to_bytes(4, "big", signed=True)
    upright = one + bytes(12) + one
    matrix = data.index(upright, data.index(b"tkhd"))
    data[matrix : matrix + len(upright)] = bytes(4) + one + bytes(4) + minus + bytes(4)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(data)
    frame = next(iter(VideoSource(str(turned))))
    np.testing.assert_array_equal(frame, np.rot90(next(iter(VideoSource(str(clip_path)))), -1))


def test_grey_video_has_one_channel(tmp_path: Path) -> None:
    path = tmp_path / "grey.mkv"
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 8, 8, "gray"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "gray")))
        container.mux(stream.encode(None))
    np.testing.assert_array_equal(next(iter(VideoSource(str(path)))), pixels[..., None])


def cut(clip: Path, folder: Path) -> Path:
    path = folder / "cut.mp4"
    path.write_bytes(clip.read_bytes()[:300_000])  # its index is at the end
    return path


def text(clip: Path, folder: Path) -> Path:
    path = folder / "text.mp4"
    path.write_text("this is not a video")
    return path


def empty(clip: Path, folder: Path) -> Path:
    path = folder / "empty.mp4"
    path.touch()
    return path


def sound(clip: Path, folder: Path) -> Path:
    path = folder / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        samples.rate = 8000
        container.mux(stream.encode(samples))
    return path


@pytest.mark.parametrize("make", [cut, text, empty, sound])
def test_files_that_are_no_video(make: Callable[[Path, Path], Path], clip_path: Path, tmp_path: Path) -> None:
    path = make(clip_path, tmp_path)
    with pytest.raises(InputError, match=path.name):
        open_source(str(path))


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_video_that_breaks_half_way(damage: str, clip_path: Path, tmp_path: Path) -> None:
    data = bytearray(remux(clip_path, tmp_path / "whole.mp4", movflags="faststart"))
    middle = len(data) // 2
    if damage == "cut":
        del data[middle:]
    else:
        data[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    path = tmp_path / "broken.mp4"
    path.write_bytes(data)
    frames: list[NDArray[Any]] = []
    with pytest.raises(InputError, match=r"broken\.mp4: broken .*frame \d+"):
        frames.extend(open_source(str(path)))
    assert 30 < len(frames) < 90


@pytest.mark.parametrize("name", ["camera:999", "rtsp://127.0.0.1:9/none", "nothing.mp4", "nothing.npy"])
def test_sources_that_are_not_there(name: str) -> None:
    with pytest.raises(InputError, match=name):
        open_source(name)


def test_folder_in_natural_order(tmp_path: Path) -> None:
    for number in range(12):
        write_picture(tmp_path / f"frame{number}.png", np.full((4, 6, 3), number, np.uint8))
    (tmp_path / "notes.txt").write_text("not a picture")
    source = open_source(str(tmp_path))
    assert source.length == 12
    frames = list(source)
    assert [int(frame[0, 0, 0]) for frame in frames] == list(range(12))
    assert frames[0].shape == (4, 6, 3)


def test_folder_of_grey_and_transparent_pictures(tmp_path: Path) -> None:
    write_picture(tmp_path / "grey" / "a.png", np.full((4, 6), 7, np.uint8), "gray")
    assert next(iter(FolderSource(tmp_path / "grey"))).shape == (4, 6, 1)
    write_picture(tmp_path / "b.png", np.full((4, 6, 4), 7, np.uint8), "rgba")
    assert next(iter(FolderSource(tmp_path))).tolist() == np.full((4, 6, 3), 7).tolist()


def test_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no picture"):
        open_source(str(tmp_path))


def test_folder_with_a_broken_picture(tmp_path: Path) -> None:
    write_picture(tmp_path / "0.png", np.zeros((4, 6, 3), np.uint8))
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n")
    frames = iter(FolderSource(tmp_path))
    next(frames)
    with pytest.raises(InputError, match=r"1\.png"):
        next(frames)


def test_folder_with_two_sizes(tmp_path: Path) -> None:
    write_picture(tmp_path / "0.png", np.zeros((4, 6, 3), np.uint8))
    write_picture(tmp_path / "1.png", np.zeros((4, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"1\.png: is \(4, 8, 3\), the first picture \(4, 6, 3\)"):
        list(FolderSource(tmp_path))


@given(st.lists(st.integers(0, 10**12), unique=True))
def test_natural_order_of_numbers(numbers: list[int]) -> None:
    names = [f"frame{number}.png" for number in numbers]
    assert sorted(names, key=natural_key) == [f"frame{number}.png" for number in sorted(numbers)]


@given(st.lists(st.text()))
def test_natural_order_takes_any_name(names: list[str]) -> None:
    assert sorted(sorted(names, key=natural_key, reverse=True), key=natural_key) == sorted(names, key=natural_key)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 4, 6, 3), np.uint8), np.zeros((2, 4, 6, 1), np.uint8), np.zeros((2, 3, 4, 6), np.float16)],
    ids=["rgb", "grey", "float"],
)
def test_array(array: NDArray[Any], tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", array)
    source = open_source(str(tmp_path / "clip.npy"))
    assert source.length == 2
    np.testing.assert_array_equal(list(source), array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 6, 3), np.uint8),
        np.zeros((2, 4, 6, 3), np.int32),
        np.zeros((2, 4, 6, 2), np.uint8),
        np.zeros((2, 4, 6, 3), np.float32),
        np.zeros((0, 4, 6, 3), np.uint8),
        np.zeros(5, np.float32),
    ],
    ids=["rank", "dtype", "channels", "layout", "no frames", "vector"],
)
def test_refused_arrays(array: NDArray[Any], tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", array)
    with pytest.raises(InputError, match=r"clip\.npy: expected"):
        ArraySource(tmp_path / "clip.npy")


@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_array(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "clip.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"clip\.npy: not a readable \.npy array"):
        ArraySource(tmp_path / "clip.npy")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError):
        ArraySource(tmp_path / "clip.npy")


@pytest.mark.parametrize("channels", [1, 3])
def test_raw_frames(channels: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 4, 6, channels), np.uint8)
    np.testing.assert_array_equal(list(RawSource(io.BytesIO(frames.tobytes()), (6, 4), channels)), frames)


def test_raw_stream_that_ends_inside_a_frame() -> None:
    source = iter(RawSource(io.BytesIO(bytes(100)), (6, 4), 3))
    next(source)
    with pytest.raises(InputError, match="ended inside frame 1: 28 of 72 bytes"):
        next(source)


@pytest.mark.parametrize(("name", "size"), [("-", None), ("clip.mp4", (6, 4))])
def test_size_belongs_to_stdin(name: str, size: tuple[int, int] | None) -> None:
    with pytest.raises(StepcellError, match="--size"):
        open_source(name, size=size)


def test_matroska_that_was_cut_off_gives_its_frames_and_then_says_so(clip_path: Path, tmp_path: Path) -> None:
    whole = remux(clip_path, tmp_path / "whole.mkv")
    assert sum(1 for _ in VideoSource(str(tmp_path / "whole.mkv"))) == 120
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    frames: list[NDArray[Any]] = []
    with pytest.raises(InputError, match=r"cut off: its header says 4\.0 s, |broken"):
        frames.extend(VideoSource(str(tmp_path / "cut.mkv")))
    assert 20 < len(frames) < 100


def test_an_array_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    """A mapped file would kill the process with SIGBUS."""
    path = tmp_path / "clip.npy"
    np.save(path, np.ones((100, 64, 64, 3), np.uint8))
    frames = iter(open_source(str(path)))
    assert next(frames).all()
    os.truncate(path, path.stat().st_size // 4)
    with pytest.raises(InputError, match=r"cut off at frame 2[0-9] of 100"):
        list(frames)


def test_an_array_in_fortran_order(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).random((5, 3, 4, 6), np.float32)
    np.save(tmp_path / "clip.npy", np.asfortranarray(frames))
    np.testing.assert_array_equal(list(open_source(str(tmp_path / "clip.npy"))), frames)


def test_another_file_under_the_name_of_an_array(tmp_path: Path) -> None:
    path = tmp_path / "clip.npy"
    with path.open("wb") as file:
        np.savez(file, frames=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(InputError, match="not a readable"):
        open_source(str(path))


class Failing(io.RawIOBase):
    """A pipe whose reads fail."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raise OSError(5, "Input/output error")


def test_a_pipe_that_breaks() -> None:
    with pytest.raises(InputError, match=r"stdin: cannot be read \(Input/output error\)"):
        list(RawSource(io.BufferedReader(Failing()), (2, 2), 3))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rtsp://user:pass:w@rd@host/a:b", "rtsp://user:***@host/a:b"),
        ("rtsp://user@host:554/x", "rtsp://user@host:554/x"),
        ("http://host:80/a:b@c", "http://host:80/a:b@c"),
        ("/a:b@c/clip.mp4", "/a:b@c/clip.mp4"),
        ("a\udcff.mp4", "a\\udcff.mp4"),
        ("ü.mp4", "ü.mp4"),
    ],
    ids=ascii,
)
def test_what_is_shown_of_a_name(name: str, expected: str) -> None:
    assert display_name(name) == expected
