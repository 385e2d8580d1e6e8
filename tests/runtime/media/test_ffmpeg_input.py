"""An input is the file that was named, and nothing that its name or its content names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stepcell.errors import InputError, UsageError
from stepcell.runtime.media.picture_folder import FolderSource
from stepcell.runtime.media.video_reader import VideoSource

av = pytest.importorskip("av")


def picture(path: Path, value: int) -> Path:
    with av.open(f"file:{path}", "w", format="image2", options={"update": "1"}) as out:
        stream = out.add_stream("mjpeg" if path.suffix == ".jpg" else path.suffix[1:], rate=1)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuvj420p" if path.suffix == ".jpg" else "bgr24" if path.suffix == ".bmp" else "rgb24"
        frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), value, np.uint8), "rgb24")
        out.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        out.mux(stream.encode(None))
    return path


def clip(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 16
        for _ in range(30):  # FFmpeg recognises no shorter MPEG-TS
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_a_picture_named_with_a_pattern_reads_itself(tmp_path: Path, suffix: str) -> None:
    for name, value in (("a%d", 40), ("a1", 80), ("a%03d", 120), ("b*", 160), ("b?", 200), ("c:d", 240)):
        picture(tmp_path / "p.png", value).rename(tmp_path / "x")  # the writer expands the name too
        (tmp_path / "x").unlink()
        picture(tmp_path / f"p{suffix}", value).rename(tmp_path / f"{name}{suffix}")
    values = [int(frame.mean().round()) for frame in FolderSource(tmp_path)]
    assert len(values) == 6
    assert np.allclose(sorted(values), [40, 80, 120, 160, 200, 240], atol=3)
    (alone,) = VideoSource(str(tmp_path / f"a%d{suffix}"))
    assert abs(alone.mean() - 40) < 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{outside}\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{outside}\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile {outside}\n"),
        ("list.mkv", "ffconcat version 1.0\nfile ../outside.avi\n"),
        ("call.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"),
        ("m.mpd", '<?xml version="1.0"?><MPD><BaseURL>{outside}</BaseURL></MPD>'),
    ],
)
def test_a_list_of_files_is_refused(tmp_path: Path, name: str, text: str) -> None:
    outside = clip(tmp_path / "outside.avi")
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    path.write_text(text.format(outside=outside))
    with pytest.raises(InputError, match="names other files, which are not opened"):
        VideoSource(str(path))


@pytest.mark.parametrize("name", ["file:///etc/hostname", "concat://a|b", "pipe://0", "subfile://x", "lavfi://x"])
def test_other_protocols_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="expected a URL of rtsp"):
        VideoSource(name)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi", ".ts", ".m4v"])
def test_videos_are_read(tmp_path: Path, suffix: str) -> None:
    assert len(list(VideoSource(str(clip(tmp_path / f"v{suffix}"))))) == 30


def test_a_name_with_a_null_byte_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        VideoSource("a\0b.mp4")
