"""Sinks: files that can be read again, and older files that stay."""

from __future__ import annotations

import contextlib
import io
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import InputError, OutputError, UsageError
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.picture_folder import FolderSource
from stepcell.runtime.media.raw_frames import RawSink
from stepcell.runtime.media.sink import Sink
from stepcell.runtime.media.video_reader import VideoSource
from stepcell.runtime.media.video_repair import repair_video
from stepcell.runtime.media.video_writer import VideoSink, encoder_for

FPS = Fraction(30000, 1001)


def noise(count: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


def write_all(sink: Sink, frames: NDArray[np.uint8]) -> None:
    for frame in frames:
        sink.write(frame)
    sink.close()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("shape", [(48, 64, 3), (33, 47, 3), (1, 1, 3), (48, 64, 1)], ids=str)
def test_video_is_playable_and_has_the_colours(suffix: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    colours = np.uint8([[200, 40, 30], [20, 60, 200], [128, 128, 128], [10, 180, 90]])[:, : shape[2]]
    path = tmp_path / f"out{suffix}"
    write_all(open_sink(str(path), FPS), np.broadcast_to(colours[:, None, None], (4, *shape)))
    source = VideoSource(str(path))
    assert source.fps == pytest.approx(float(FPS), rel=1e-3)
    frames = np.stack(list(source))
    assert frames.shape == (4, shape[0] + shape[0] % 2, shape[1] + shape[1] % 2, 3)
    assert np.abs(frames[:, : shape[0], : shape[1]].astype(int) - colours[:, None, None]).max() <= 4


def test_video_is_close_to_the_frames(clip_path: Path, tmp_path: Path) -> None:
    frames = np.stack(list(VideoSource(str(clip_path))))[:30]
    write_all(VideoSink(tmp_path / "out.mp4", FPS), frames)
    again = np.stack(list(VideoSource(str(tmp_path / "out.mp4"))))
    error = np.mean((again.astype(float) - frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 33


def test_encoder_is_chosen_from_what_there_is() -> None:
    assert encoder_for({"libx264", "mpeg4"})[0] == "libx264"
    assert encoder_for({"mpeg4", "png"})[0] == "mpeg4"


def test_mpeg4_where_there_is_no_h264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    write_all(VideoSink(tmp_path / "out.mp4", FPS), np.full((5, 32, 32, 3), 100, np.uint8))
    frames = list(VideoSource(str(tmp_path / "out.mp4")))
    assert len(frames) == 5
    assert np.abs(frames[2].astype(int) - 100).max() <= 4


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


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("count", [1, 12])
def test_array_is_exact(dtype: str, count: int, tmp_path: Path) -> None:
    frames = noise(count, 3, 5, 4).astype(dtype)
    write_all(ArraySink(tmp_path / "out.npy"), frames)
    again = np.load(tmp_path / "out.npy")
    assert again.dtype == dtype
    np.testing.assert_array_equal(again, frames)


def test_raw_frames_are_exact() -> None:
    stream = io.BytesIO()
    frames = noise(3, 4, 6, 3)
    write_all(RawSink(stream), frames)
    assert stream.getvalue() == frames.tobytes()


@pytest.mark.parametrize("name", ["out.mp4", "out.npy", "out"])
def test_abandoned_output_leaves_nothing(name: str, tmp_path: Path) -> None:
    for count in (0, 3):
        sink = open_sink(str(tmp_path / name), FPS)
        for frame in noise(count, 16, 16, 3):
            sink.write(frame)
        sink.abandon()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.mp4", "out.npy"])
def test_old_file_stays_until_the_new_one_is_whole(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("precious")
    sink = open_sink(str(path), FPS)
    sink.write(noise(1, 16, 16, 3)[0])
    assert path.read_text() == "precious"
    sink.abandon()
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["none/out.mp4", "none/out.npy", "none/out", "full.mp4", "full.npy", "full", "file"])
def test_outputs_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    for folder in ("full.mp4", "full.npy", "full"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "precious").touch()
    (tmp_path / "file").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=name):
        open_sink(str(tmp_path / name), FPS)
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_kind_of_output(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--output: expected"):
        open_sink(str(tmp_path / "out.gif"), FPS)


def test_full_disk_is_an_output_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "wb", buffering=0) as stream, pytest.raises(OutputError, match="No space left"):  # noqa: PTH123
        RawSink(stream).write(noise(1, 4, 4, 3)[0])  # type: ignore[arg-type]


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


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_video_that_is_not_finished_can_be_played(suffix: str, tmp_path: Path) -> None:
    """As after SIGKILL or a power failure: the file on the disk consists of fragments of a second."""
    frames = noise(300, 48, 64, 3)
    sink = VideoSink(tmp_path / f"out{suffix}", Fraction(25))
    for frame in frames:
        sink.write(frame)
    (unfinished,) = tmp_path.iterdir()
    copy = tmp_path / f"copy{suffix}"
    copy.write_bytes(unfinished.read_bytes())
    sink.close()
    found = VideoSource(str(copy))
    count = 0
    with contextlib.suppress(InputError):  # the last fragment may be cut off
        for _ in found:
            count += 1
    found.close()
    assert count >= 200, f"{count} of 300 frames"
    assert len(list(VideoSource(str(tmp_path / f"out{suffix}")))) == 300


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_a_finished_video_has_one_index_and_starts_at_zero(suffix: str, tmp_path: Path) -> None:
    """Fragments in a finished file would slow down seeking, and B-frames would shift its timestamps."""
    write_all(VideoSink(tmp_path / f"out{suffix}", Fraction(25)), noise(100, 48, 64, 3))
    source = VideoSource(str(tmp_path / f"out{suffix}"))
    next(iter(source))
    assert (source.length, source.seconds) == (100, 0.0)
    data = (tmp_path / f"out{suffix}").read_bytes()
    assert repair_video(tmp_path / f"out{suffix}") == 100, "a complete file is not truncated"
    assert (tmp_path / f"out{suffix}").read_bytes() == data


def test_an_array_that_does_not_fit_is_removed(tmp_path: Path) -> None:
    """Closing the file fails like the writes before."""
    path = tmp_path / "out.npy"
    sink = ArraySink(path)
    sink.write(np.zeros((1, 4, 4), np.float32))
    # Close the descriptor, so that every further write fails.
    os.close(sink._file.fileno())
    sink.abandon()
    assert not list(tmp_path.iterdir())
