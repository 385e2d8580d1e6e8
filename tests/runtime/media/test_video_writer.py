"""Video writer: files that can be played, also if they are not finished."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from stepcell.errors import InputError
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.video_reader import VideoSource
from stepcell.runtime.media.video_repair import repair_video
from stepcell.runtime.media.video_writer import VideoSink, encoder_for
from tests.runtime.media.frames import noise, write_all

FPS = Fraction(30000, 1001)


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


_WRITE = """
import sys
from fractions import Fraction
from pathlib import Path
import numpy as np
from stepcell.runtime.media.video_writer import VideoSink
rng = np.random.default_rng(0)
y, x = np.mgrid[:144, :176]
sink = VideoSink(Path(sys.argv[1]), Fraction(25))
for t in range(60):
    wave = 127 + 100 * np.sin((x + 3 * t) / 17) * np.cos((y - 2 * t) / 23)
    sink.write((wave[..., None] + rng.integers(-20, 20, (144, 176, 3))).clip(0, 255).astype(np.uint8))
sink.close()
"""


def test_the_same_frames_give_the_same_file_whatever_the_heap_holds(tmp_path: Path) -> None:
    files = []
    for fill in ("0", "1", "7"):  # glibc fills fresh memory with it
        path = tmp_path / f"{fill}.mkv"
        command = [sys.executable, "-c", _WRITE, str(path)]
        subprocess.run(command, check=True, env={**os.environ, "MALLOC_PERTURB_": fill})
        with av.open(str(path)) as container:
            files.append(b"".join(bytes(packet) for packet in container.demux(video=0)))
    assert len(set(files)) == 1, f"sizes {list(map(len, files))}"


def test_encoder_is_chosen_from_what_there_is() -> None:
    assert encoder_for({"libx264", "mpeg4"})[0] == "libx264"
    assert encoder_for({"mpeg4", "png"})[0] == "mpeg4"


def test_mpeg4_where_there_is_no_h264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    write_all(VideoSink(tmp_path / "out.mp4", FPS), np.full((5, 32, 32, 3), 100, np.uint8))
    frames = list(VideoSource(str(tmp_path / "out.mp4")))
    assert len(frames) == 5
    assert np.abs(frames[2].astype(int) - 100).max() <= 4


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
