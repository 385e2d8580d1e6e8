"""A snapshot is never ahead of the frames that the output holds, so a resumed run loses none."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell.errors import OutputError
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.streams.report import RunError
from stepcell.runtime.streams.run import run_streams
from tests.fakes.frame_source import FrameSource

Model = Callable[..., Path]
ONE = np.ones((3, 8, 8), np.float32)


class Holding(ArraySink):
    """A sink like an encoder: it holds back the last frames, and can run out of space."""

    def __init__(self, path: Path, back: int, room: int = 1 << 30) -> None:
        super().__init__(path)
        self._back, self._room = back, room

    @property
    def whole(self) -> int:
        return max(0, self._count - self._back)

    def write(self, frame: Any) -> None:
        if self._count == self._room:
            raise OutputError(f"{self.name}: cannot be written ({errno.ENOSPC})")
        super().write(frame)

    def salvage(self) -> int:
        self._count = self.whole
        return super().salvage()


@pytest.mark.parametrize(("back", "at_least"), [(0, 30), (7, 10), (12, 5), (40, None)])
def test_after_a_full_disk_nothing_is_lost(accumulator: Model, tmp_path: Path, back: int, at_least: int | None) -> None:
    path, frames, room = tmp_path / "state.safetensors", [ONE] * 50, 33
    options: dict[str, Any] = {"snapshot": path, "snapshot_every": 5}
    with StepLoop.open(accumulator()) as loop, pytest.raises(RunError) as failed:
        run_streams(loop, FrameSource("frames", frames), Holding(tmp_path / "a.npy", back, room), **options)
    (report,) = failed.value.report.streams
    held = max(0, room - back)
    resumes_at = report.resumes_at
    assert report.written == held
    assert path.exists() == (resumes_at is not None)
    assert resumes_at is None if at_least is None else at_least <= (resumes_at or 0) <= held
    with StepLoop.open(accumulator()) as loop:
        (report,) = run_streams(
            loop, FrameSource("frames", frames), Holding(tmp_path / "b.npy", back), resume=True, **options
        ).streams
    assert report.first_frame == (resumes_at or 0) <= held
    values = np.load(tmp_path / "b.npy")[:, 0, 0, 0].tolist()
    assert values == list(range(report.first_frame + 1, 51))
    assert report.resumes_at == 50


def test_states_wait_for_the_output_while_the_run_goes_on(accumulator: Model, tmp_path: Path) -> None:
    path, seen = tmp_path / "state.safetensors", []
    sink = Holding(tmp_path / "a.npy", 7)

    def look(_: object) -> None:
        if path.exists():
            with StepLoop.open(accumulator()) as other:
                seen.append((other.restore(path).frame, sink.whole))

    with StepLoop.open(accumulator()) as loop:
        source = FrameSource("frames", [ONE] * 40)
        run_streams(loop, source, sink, snapshot=path, snapshot_every=3, progress=look)
    assert all(frame <= whole or frame == 40 for frame, whole in seen)
    assert len({frame for frame, _ in seen}) > 2
    assert seen[-1][0] == 40


def test_a_live_source_does_not_wait(accumulator: Model, tmp_path: Path) -> None:
    source = FrameSource("frames", [ONE] * 10)
    source.live = True
    sink, path = Holding(tmp_path / "a.npy", 3, 8), tmp_path / "s.safetensors"
    with StepLoop.open(accumulator()) as loop, pytest.raises(RunError) as failed:
        run_streams(loop, source, sink, snapshot=path, snapshot_every=4)
    assert failed.value.report.streams[0].resumes_at in (4, 8)
