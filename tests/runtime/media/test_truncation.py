"""Pieces of a recording are whole, whatever their clock; files that were cut off are not."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from stepcell.errors import InputError
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.truncation import missing_bytes
from tests.runtime.media.clips import write_clip

SECOND = 25  # frames
NOISE = list(np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8))


@pytest.mark.parametrize("kind", ["matroska", "webm", "mp4", "mpegts"])
def test_pieces_of_a_recording(kind: str, tmp_path: Path) -> None:
    """As FFmpeg's segment muxer leaves them: the clock of each goes on from the one before."""
    codec = {"webm": "libvpx", "mpegts": "mpeg2video"}.get(kind, "mpeg4")
    if codec not in av.codecs_available:
        pytest.skip("FFmpeg has no VP8 encoder here")
    options = {"segment_time": "1", "segment_format": kind}
    with av.open(str(tmp_path / "piece%d.bin"), "w", format="segment", options=options) as container:
        stream = container.add_stream(codec, rate=25, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in NOISE:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    counts = [len(list(open_source(str(tmp_path / f"piece{n}.bin")))) for n in range(3)]
    assert sum(counts) == 60
    assert min(counts) >= 9


@pytest.mark.parametrize("declared", ["from zero", "from the first frame"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut off"])
def test_matroska_whose_clock_starts_late(declared: str, whole: bool, tmp_path: Path) -> None:
    """FFmpeg declares the duration from zero, mkvmerge from the first frame on."""
    path = write_clip(tmp_path / "late.mkv", NOISE, start=100 * SECOND)
    data = path.read_bytes()
    at = data.index(b"\x44\x89\x88") + 3  # duration: a float64 in milliseconds
    assert np.frombuffer(data[at : at + 8], ">f8")[0] == pytest.approx(102400, abs=50)
    if declared == "from the first frame":
        data = data[:at] + np.array(2400, ">f8").tobytes() + data[at + 8 :]
    path.write_bytes(data if whole else data[: len(data) // 2])
    frames = []
    if whole:
        assert len(list(open_source(str(path)))) == 60
        assert missing_bytes(path) == 0
        return
    with pytest.raises(InputError, match=r"truncated: \d+ bytes are missing at its end"):
        frames.extend(open_source(str(path)))
    assert 10 < len(frames) < 60


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi"])
def test_declared_length(suffix: str, tmp_path: Path) -> None:
    flags = {"movflags": "faststart"} if suffix in (".mp4", ".mov") else {}
    path = write_clip(tmp_path / f"clip{suffix}", NOISE, **flags)
    assert missing_bytes(path) == 0
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    missing = missing_bytes(path)
    assert missing is not None
    assert missing == pytest.approx(len(data) / 3, abs=600)  # an index of frames may follow
    with pytest.raises(InputError, match=r"truncated|broken"):
        list(open_source(str(path)))


def test_fragmented_mp4(tmp_path: Path) -> None:
    """Written live, its fragments start late; cut off inside one, the rest of it is missing."""
    flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "400000"}
    path = write_clip(tmp_path / "clip.mp4", NOISE, start=100 * SECOND, **flags)
    assert len(list(open_source(str(path)))) == 60
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"truncated|broken"):
        list(open_source(str(path)))


def test_what_is_behind_the_frames_is_not_needed(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", NOISE, movflags="faststart")
    path.write_bytes(path.read_bytes() + b"\0\0\1\0free" + bytes(8))
    assert len(list(open_source(str(path)))) == 60


@pytest.mark.parametrize("timed", ["0", "1"], ids=["ts", "m2ts"])
def test_transport_stream_ends_with_a_whole_packet(timed: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.ts", NOISE, codec="mpeg2video", start=7 * SECOND, mpegts_m2ts_mode=timed)
    assert missing_bytes(path) == 0
    assert len(list(open_source(str(path)))) == 60
    assert open_source(str(path)).fps == Fraction(25)
    path.write_bytes(path.read_bytes()[:50_001])
    assert 0 < (missing_bytes(path) or 0) < 192
    with pytest.raises(InputError, match=r"truncated: \d+ bytes are missing"):
        list(open_source(str(path)))


def test_transport_streams_that_were_joined(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    """FFmpeg marks the packet at the joint as damaged, although nothing is missing."""
    if "libx264" not in av.codecs_available:
        pytest.skip("FFmpeg has no H.264 encoder here")
    parts = [write_clip(tmp_path / f"{n}.ts", NOISE, codec="libx264", start=n * 60) for n in range(3)]
    (tmp_path / "all.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert len(list(open_source(str(tmp_path / "all.ts")))) == 180
    assert "damaged, or recordings joined there" in logged.text


def test_matroska_of_unknown_size_is_read_to_its_end(tmp_path: Path) -> None:
    """As a recorder leaves it that was switched off: neither size nor duration were filled in."""
    path = write_clip(tmp_path / "live.mkv", NOISE, start=9 * SECOND, live="1")
    assert missing_bytes(path) is None
    assert len(list(open_source(str(path)))) == 60
    assert missing_bytes(tmp_path / "nothing") is None
