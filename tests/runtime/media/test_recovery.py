"""Recordings of killed processes get a visible name, and results that cannot be moved into place are kept."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from stepcell.errors import OutputError
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.recovery import recover_recordings
from tests.runtime.media.frames import noise

RECORD = """
import os, sys
from fractions import Fraction
from stepcell.runtime.media.open_sink import open_sink
from tests.runtime.media.frames import noise
sink = open_sink(sys.argv[1], Fraction(25))
for frame in noise(int(sys.argv[2]), 48, 64, 3):
    sink.write(frame)
print("ready", flush=True)
if sys.argv[3] == "killed":
    os.kill(os.getpid(), 9)
sys.stdin.read()
sink.close()
"""


def started(path: Path, frames: int, end: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RECORD, str(path), str(frames), end]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize(("name", "least"), [("out.mkv", 200), ("out.mp4", 200), ("out.npy", 300), ("out", 299)])
def test_a_recording_of_a_killed_process_is_recovered(name: str, least: int, tmp_path: Path) -> None:
    started(tmp_path / name, 300, "killed").communicate()
    used = started(tmp_path / f"used{Path(name).suffix}", 3, "waits")
    recover_recordings(tmp_path)
    (hidden,) = tmp_path.glob(".*")
    assert hidden.name.startswith(".used.")
    (found,) = (path for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert found.name.startswith("out.")
    assert found.suffix == (Path(name).suffix or found.suffix)
    if name == "out.npy":
        assert np.load(found).shape == (300, 48, 64, 3)
    source = open_source(str(found))
    assert sum(1 for _ in source) >= least
    used.communicate(b"")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["out.mkv", "out.mp4", "out.npy", "out"])
def test_a_recording_without_a_frame_is_deleted(name: str, tmp_path: Path) -> None:
    started(tmp_path / name, 0, "killed").communicate()
    assert list(tmp_path.iterdir())
    recover_recordings(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.mkv", "out.mp4", "out.npy", "out"])
def test_results_are_kept_when_closing_fails(name: str, tmp_path: Path) -> None:
    """A foreign file in the output folder, a folder under the name of an output file: the frames are not deleted."""
    sink = open_sink(str(tmp_path / name), Fraction(25))
    for frame in noise(30, 48, 64, 3):
        sink.write(frame)
    (tmp_path / name).mkdir()
    (tmp_path / name / "foreign.txt").touch()
    with pytest.raises(OutputError, match="cannot be written") as caught:
        sink.close()
    assert sink.salvage() == 30
    sink.abandon()
    assert sink.name in str(caught.value.hint)
    assert Path(sink.name) != tmp_path / name
    assert [path.name for path in (tmp_path / name).iterdir()] == ["foreign.txt"]
    assert not list(tmp_path.glob(".*"))
    assert len(np.load(sink.name) if name == "out.npy" else list(open_source(sink.name))) == 30


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    sinks = [open_sink(str(tmp_path / "out"), Fraction(25)) for _ in range(2)]
    for number, sink in enumerate(sinks):
        for frame in noise(10 + number, 8, 8, 3):
            sink.write(frame)
    sinks[0].close()
    with pytest.raises(OutputError):
        sinks[1].close()
    assert sinks[1].salvage() == 11
    assert [len(list(Path(sink.name).iterdir())) for sink in sinks] == [10, 11]
