"""Outputs of every kind by their names: older files stay until the new one is complete."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path

import pytest

from stepcell.errors import OutputError, UsageError
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.open_source import open_source
from tests.runtime.media.frames import noise

FPS = Fraction(25)


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


@pytest.mark.parametrize("name", ["out.MP4", "out.Mkv", "OUT.NPY"])
def test_suffixes_in_capitals(name: str, tmp_path: Path) -> None:
    frames = noise(3, 16, 16, 3)
    sink = open_sink(str(tmp_path / name), FPS)
    for frame in frames:
        sink.write(frame)
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with contextlib.closing(open_source(str(tmp_path / name))) as source:
        assert len(list(source)) == 3


def test_unknown_kind_of_output(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--output: expected"):
        open_sink(str(tmp_path / "out.gif"), FPS)
