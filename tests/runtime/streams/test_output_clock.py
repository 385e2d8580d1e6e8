"""Timing of outputs: kept, or constant and said so."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell.errors import InputError, UsageError
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.streams.frame_reader import Frame
from stepcell.runtime.streams.output_clock import OutputClock, Timestamps
from stepcell.runtime.streams.report import RunError
from stepcell.runtime.streams.run import run_streams
from tests.fakes.frame_source import FrameSource
from tests.runtime.media.clips import timestamps, write_clip

Model = Callable[..., Path]
TIMES = [0, 40, 80, 500, 540, 1200, 1240, 2000, 2500, 2540]
FRAMES = [np.full((16, 16, 3), 9 * n, np.uint8) for n in range(len(TIMES))]


def frame(number: int, seconds: float | None) -> Frame:
    return Frame(FRAMES[0], seconds, 0.0, 0.0, 0, number)


def test_kept_timestamps_are_those_of_the_source_and_always_increase() -> None:
    clock = OutputClock(Fraction(25), keep=True, name="camera")
    read = [7.0, 7.1, 7.5, 3.0, 3.1, 90000.0, 90000.1, 90000.1]
    found = [clock.seconds(frame(number, seconds)) for number, seconds in enumerate(read)]
    assert found == pytest.approx([7.0, 7.1, 7.5, 7.54, 7.64, 7.68, 7.78, 7.82])


def test_a_dropped_frame_leaves_a_gap_at_a_constant_rate_too() -> None:
    clock = OutputClock(Fraction(10), keep=False, name="stdin")
    assert [clock.seconds(frame(number, None)) for number in (3, 4, 8, 9)] == pytest.approx([0, 0.1, 0.5, 0.6])


def test_a_frame_without_a_timestamp_cannot_keep_it() -> None:
    clock = OutputClock(Fraction(25), keep=True, name="frames")
    with pytest.raises(InputError, match="frames: frame 0 has no timestamp to keep"):
        clock.seconds(frame(0, None))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_varying_timing(suffix: str, accumulator: Model, tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    clip = write_clip(tmp_path / "in.mkv", FRAMES, milliseconds=[each + 9000 for each in TIMES])
    output = tmp_path / f"out{suffix}"
    run_streams(accumulator(), clip, output)
    assert timestamps(output) == [pytest.approx(n / 25, abs=1e-3) for n in range(len(TIMES))]
    line = "the output has constant 25 frames per second: --timestamps keep keeps the timing"
    assert logged.text.count(line) == 1
    logged.clear()
    run_streams(accumulator(), clip, output, timestamps="keep")
    assert timestamps(output) == [pytest.approx(each / 1000, abs=1e-3) for each in TIMES]
    run_streams(accumulator(), clip, tmp_path / "array.npy")
    run_streams(accumulator(), clip, output, timestamps="constant")
    assert line not in logged.text


@pytest.mark.parametrize("timestamps_", [None, "constant"])
def test_a_recording_lasts_as_long_as_the_camera_was_on(
    timestamps_: Timestamps | None, accumulator: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue drops most frames; those that are left keep their time, so that the recording is not shorter."""
    count = 100
    source = FrameSource("camera", [np.full((16, 16, 3), n, np.uint8) for n in range(count)], pause=0.001, live=True)
    step = StepLoop.step_async

    def slow_step(loop: StepLoop, /, **inputs: Any) -> Any:
        time.sleep(0.004)
        return step(loop, **inputs)

    monkeypatch.setattr(StepLoop, "step_async", slow_step)
    output = tmp_path / "out.mp4"
    report = run_streams(accumulator(), source, output, deadline_ms=10_000, timestamps=timestamps_).streams[0]
    dropped, found = report.dropped["queue full"], timestamps(output)
    assert dropped > 10
    assert len(found) == count - dropped
    numbers = [round(each * 25) for each in found]
    assert found == [pytest.approx(number / 25, abs=1e-3) for number in numbers]
    assert numbers[0] == 0
    assert numbers[-1] - len(found) > 10  # the gaps are there


def test_a_rate_and_kept_timestamps_contradict(accumulator: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--fps and --timestamps keep"):
        run_streams(accumulator(), "clip.mp4", tmp_path / "out.mp4", fps=25, timestamps="keep")
    np.save(tmp_path / "in.npy", np.stack(FRAMES))
    with pytest.raises(RunError, match="has no timestamp to keep"):
        run_streams(accumulator(), tmp_path / "in.npy", tmp_path / "out.mp4", timestamps="keep")
