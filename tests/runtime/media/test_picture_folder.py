"""Folders of pictures: reading in natural order, and writing."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stepcell.errors import InputError, OutputError
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.picture_folder import FolderSource, natural_key
from tests.runtime.media.frames import noise, write_all

FPS = Fraction(30000, 1001)


def write_picture(path: Path, pixels: NDArray[np.uint8], pix_fmt: str = "rgb24") -> None:
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = pixels.shape[:2]
    codec.pix_fmt, codec.time_base, codec.thread_count = pix_fmt, Fraction(1), 1
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(map(bytes, codec.encode(av.VideoFrame.from_ndarray(pixels, pix_fmt)))))


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
    with pytest.raises(InputError, match="contains no picture"):
        open_source(str(tmp_path))


def test_folder_with_a_broken_picture(tmp_path: Path) -> None:
    write_picture(tmp_path / "0.png", np.zeros((4, 6, 3), np.uint8))
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n")
    frames = iter(FolderSource(tmp_path))
    next(frames)
    with pytest.raises(InputError, match=r"1\.png"):
        next(frames)


def test_folder_with_two_sizes_gives_both(tmp_path: Path) -> None:
    write_picture(tmp_path / "0.png", np.zeros((4, 6, 3), np.uint8))
    write_picture(tmp_path / "1.png", np.zeros((4, 8, 3), np.uint8))
    assert [frame.shape for frame in FolderSource(tmp_path)] == [(4, 6, 3), (4, 8, 3)]


@pytest.mark.parametrize(("suffix", "codec", "pixels"), [
    (".webp", "libwebp", "yuv420p"), (".tif", "tiff", "rgb24"), (".TIFF", "tiff", "rgb24"), (".bmp", "bmp", "bgr24"),
])  # fmt: skip
def test_kinds_of_pictures(suffix: str, codec: str, pixels: str, tmp_path: Path) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg has no {codec} encoder here")
    colours = np.uint8([[200, 40, 30], [20, 60, 200]])
    for number, colour in enumerate(colours):
        context = av.CodecContext.create(codec, "w")
        context.height, context.width, context.pix_fmt, context.time_base = 8, 8, pixels, Fraction(1, 25)
        frame = av.VideoFrame.from_ndarray(np.full((8, 8, 3), colour, np.uint8), "rgb24").reformat(format=pixels)
        packets = [*context.encode(frame), *context.encode(None)]
        (tmp_path / f"{number}{suffix}").write_bytes(b"".join(map(bytes, packets)))
    for source in (open_source(str(tmp_path)), open_source(f"{tmp_path}/*{suffix}")):
        frames = np.stack(list(source)).astype(int)
        assert frames.shape == (2, 8, 8, 3)
        assert np.abs(frames - colours[:, None, None]).max() <= 4


@given(st.lists(st.integers(0, 10**12), unique=True))
def test_natural_order_of_numbers(numbers: list[int]) -> None:
    names = [f"frame{number}.png" for number in numbers]
    assert sorted(names, key=natural_key) == [f"frame{number}.png" for number in sorted(numbers)]


@given(st.lists(st.text()))
def test_natural_order_takes_any_name(names: list[str]) -> None:
    assert sorted(sorted(names, key=natural_key, reverse=True), key=natural_key) == sorted(names, key=natural_key)


@pytest.mark.parametrize("shape", [(9, 7, 3), (9, 7, 1)], ids=str)
def test_folder_of_pictures_is_exact(shape: tuple[int, ...], tmp_path: Path) -> None:
    frames = noise(12, *shape)
    write_all(open_sink(str(tmp_path / "out"), FPS), frames)
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[:2] == ["000000.png", "000001.png"]
    np.testing.assert_array_equal(list(FolderSource(tmp_path / "out")), frames)


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_all(open_sink(str(tmp_path / "out"), FPS), noise(2, 4, 4, 3))
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_folder_behind_a_link_is_filled(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    sink = open_sink(str(tmp_path / "link"), Fraction(25))
    sink.write(np.zeros((8, 8, 3), np.uint8))
    sink.close()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["000000.png"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_replaced_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is the working folder"):
        open_sink(".", Fraction(25))
    with pytest.raises(OutputError, match="holds files already"):
        open_sink("/", Fraction(25))
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(OutputError, match="is a mount point"):
        open_sink("volume", Fraction(25))
