"""Colours of a video: every matrix, range and depth comes out as it was, in frames and in tags."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video import reformatter

from stepcell.errors import InputError, MissingDependencyError
from stepcell.optional_imports import require
from stepcell.runtime.doctor import _video
from stepcell.runtime.media.colour import Colour
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.video_reader import VideoSource
from tests.runtime.media.clips import WEIGHTS, marked, write_clip
from tests.runtime.media.frames import write_all

WRITES_BT2020 = hasattr(reformatter.Colorspace, "BT2020")  # PyAV 17 does not
PQ, HLG = 16, 18


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("matrix", WEIGHTS)
def test_decoded_colours_equal_the_standards(matrix: int, pixels: str, full: bool) -> None:
    """Before version 17, PyAV took full range and BT.2020 for limited BT.601: up to 18 levels off."""
    bits = 10 if "10" in pixels else 8
    coded = np.array([150, 100, 170]) << (bits - 8)
    frame = av.VideoFrame(16, 16, pixels)
    for plane, value in zip(frame.planes, coded, strict=True):
        kind = np.uint16 if bits > 8 else np.uint8
        plane.update(np.full(plane.buffer_size // np.dtype(kind).itemsize, value, kind).tobytes())
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    kr, kb = WEIGHTS[matrix]
    scale = np.array([219, 224, 224]) if not full else np.full(3, 255.75 if bits > 8 else 255)
    y, u, v = (coded / (1 << (bits - 8)) - [16 * (not full), 128, 128]) / scale
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    source = VideoSource.__new__(VideoSource)
    source._path, source._rotation, source._nv12, source.colour = None, None, None, Colour()
    assert np.abs(source._pixels(frame)[8, 8] - 255 * np.array([red, green, blue])).max() < 2.6


@pytest.mark.parametrize("tags", [(1, 1, 1), (6, 6, 6), (9, 9, PQ), (9, 9, HLG), (9, 9, 14), (1, 12, 13)], ids=str)
def test_a_video_has_the_colours_and_tags_of_its_input(
    tags: tuple[int, int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="stepcell")
    path = write_clip(tmp_path / "in.mkv", [marked()] * 3, codec="ffv1", pixels="yuv444p", colour=tags)
    source = open_source(str(path))
    frames = np.stack(list(source))
    assert np.abs(frames - marked().astype(int)).max() <= 4
    write_all(open_sink(str(tmp_path / "out.mp4"), Fraction(25), like=source), frames)
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0))
    matrix = 9 if tags[1] == 9 and WRITES_BT2020 else 1
    assert (frame.colorspace, frame.color_primaries, frame.color_trc) == (matrix, *tags[1:])
    assert np.abs(next(iter(open_source(str(tmp_path / "out.mp4")))).astype(int) - marked()).mean() < 4
    words = {PQ: "high dynamic range (PQ, BT.2020, 8 bits)", HLG: "high dynamic range (HLG, BT.2020, 8 bits)"}
    assert (words.get(tags[2], "dynamic range") in caplog.text) == (tags[2] in words)
    assert ("without tone mapping" in caplog.text) == (tags[2] in words)


def test_a_matrix_that_is_not_computed_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "in.mkv", [marked()], codec="ffv1", pixels="yuv444p", colour=(14, 9, PQ))
    with pytest.raises(InputError, match=r"colour matrix \(number 14 of ITU-T H\.273\) is not supported"):
        list(open_source(str(path)))


def test_full_range_video(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "in.mkv", [marked()] * 2, codec="ffv1", pixels="yuv444p", full_range=True)
    assert np.abs(next(iter(open_source(str(path)))).astype(int) - marked()).max() <= 3


def test_a_version_that_converts_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "__version__", "16.1.0")
    with pytest.raises(MissingDependencyError, match=r"'av' 17\.1 or later, got 16\.1\.0"):
        require("av", extra="video", purpose="reading video")


def test_doctor_names_a_version_that_converts_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _video().ok
    monkeypatch.setattr(av, "__version__", "16.1.0")
    found = _video()
    assert not found.ok
    assert "17.1 or later, got 16.1.0" in found.found
