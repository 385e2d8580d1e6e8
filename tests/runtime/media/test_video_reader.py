"""Video reader: real files, cameras, and broken files of every kind."""

from __future__ import annotations

import gc
import io
import os
import socket
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.models.zoo.clips import read_clip
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.video_reader import VideoSource
from tests.runtime.media.frames import remux

WIDTH, HEIGHT = 176, 144


def test_video_equals_plain_decoding(clip_path: Path) -> None:
    source = open_source(str(clip_path))
    assert (source.length, source.fps) == (120, pytest.approx(29.97, abs=0.01))
    frames = list(source)
    source.close()
    with av.open(str(clip_path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_array_equal(frames, expected)
    assert np.stack(frames).shape == (120, HEIGHT, WIDTH, 3)


def living_frames() -> list[av.VideoFrame]:
    """Those of the size of the clip."""
    frames = [each for each in gc.get_objects() if type(each) is av.VideoFrame]
    return [frame for frame in frames if (frame.width, frame.height) == (176, 144)]


def test_frames_are_freed_without_the_garbage_collector(clip_path: Path) -> None:
    """A long stream would hold memory and threads until it runs."""
    gc.collect()
    gc.disable()
    try:
        others = {id(frame) for frame in living_frames()}  # readers of other tests may not have ended
        assert sum(1 for _ in VideoSource(str(clip_path))) == 120
        assert sum(id(frame) not in others for frame in living_frames()) <= 3
    finally:
        gc.enable()


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


def test_matroska_that_was_cut_off_gives_its_frames_and_then_says_so(clip_path: Path, tmp_path: Path) -> None:
    whole = remux(clip_path, tmp_path / "whole.mkv")
    assert sum(1 for _ in VideoSource(str(tmp_path / "whole.mkv"))) == 120
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    frames: list[NDArray[Any]] = []
    with pytest.raises(InputError, match=r"truncated: \d+ bytes are missing at its end|broken"):
        frames.extend(VideoSource(str(tmp_path / "cut.mkv")))
    assert 20 < len(frames) < 100


def test_no_frame_of_a_camera_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it stops, all frames it sent are there, however many threads decode."""
    if "libx264" not in av.codecs_available:
        pytest.skip("FFmpeg has no H.264 encoder here")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25, options={"tune": "zerolatency"})
        stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
        for frame in read_clip("carphone_pristine")[:30]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    monkeypatch.setattr("stepcell.runtime.media.video_reader.URL_TIMEOUT", (30.0, 3.0))
    gate = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            with server.accept()[0] as connection:
                connection.sendall(buffer.getvalue())
                gate.wait(30)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        source = VideoSource(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        source._stream.codec_context.thread_count = 8  # as on a device with more cores
        frames = []
        with pytest.raises(InputError, match="no answer within 3 s"):
            frames.extend(source)
        gate.set()
        thread.join(10)
    source.close()
    assert len(frames) >= 28, f"{len(frames)} of 30 frames"  # the last one may wait for the start of the next


def damaged(data: bytes, every: int) -> bytes:
    """A transport stream in which every n-th packet of the second half is marked as damaged."""
    packets = bytearray(data)
    for start in range(len(data) // 376 * 188, len(data), 188 * every):
        packets[start + 1] |= 0x80  # transport_error_indicator, ISO/IEC 13818-1
    return bytes(packets)


def test_a_camera_goes_on_after_a_broken_packet(camera: Any) -> None:
    camera._data = damaged(camera._data, 40)
    source = VideoSource(camera.url)
    frames = len(list(source))
    source.close()
    assert 40 <= frames < 60, f"{frames} of 60 frames"


def test_a_camera_of_which_nothing_whole_comes_is_broken(camera: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    camera._data = damaged(camera._data, 1)
    monkeypatch.setattr("stepcell.runtime.media.video_reader.BROKEN_PACKETS", 10)
    source, frames = VideoSource(camera.url), []
    with pytest.raises(InputError, match=r"tcp://127.0.0.1:\d+: broken or truncated at frame \d+"):
        frames.extend(source)
    source.close()
    assert 20 < len(frames) < 40
