"""Stepping: steps that overlap give what one step after another gives, whatever goes wrong in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import DeviceError, InputError, OutputError
from stepcell.runtime.backends.base import Device, StepFuture
from stepcell.runtime.backends.onnxruntime.backend import OrtBackend
from stepcell.runtime.loop.snapshot import read_snapshot
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.streams.reset_policy import ResetPolicy
from stepcell.runtime.streams.run_control import RunControl
from stepcell.runtime.streams.run_snapshots import SnapshotWriter
from stepcell.runtime.streams.scheduler import Scheduler
from stepcell.runtime.streams.stepper import LoopStepper
from stepcell.runtime.streams.stream import Stream
from tests.fakes.frame_source import FrameSource

Model = Callable[..., Path]
TIMES = ("seconds", "frames_per_second", "latency", "step", "decode", "convert", "encode")


class Overlapping(OrtBackend):
    """ONNX Runtime whose steps can be started before the last one is waited for, as on a GPU.

    Attributes:
        overlaps: whether the scheduler is told so.
        ahead: steps that were started while another was under way.
        order: numbers of the steps in the order in which they were waited for.
        fails: number of a step that the device fails.
    """

    def __init__(self, path: Path, *, overlaps: bool) -> None:
        super().__init__(path, Device("cpu"), threads=1)
        self.overlaps = overlaps  # type: ignore[misc]
        self.ahead = self._begun = 0
        self.order: list[int] = []
        self.fails: int | None = None
        self.fails_at_once = False
        self.streams: Sequence[Stream] = ()

    def enqueue(self, inputs: Mapping[str, Any], idle: Sequence[int] = ()) -> StepFuture[dict[str, NDArray[Any]]]:
        number, self._begun = self._begun, self._begun + 1
        self.ahead += number > len(self.order)
        assert number <= len(self.order) + 1, "three steps under way"
        if self.fails == number and self.fails_at_once:
            raise DeviceError("refused")
        outputs = {name: array.copy() for name, array in self.step(inputs, idle).items()}

        def collect() -> dict[str, NDArray[Any]]:
            self.order.append(number)
            self._until_frames_are_ready()
            if self.fails == number:
                raise DeviceError("gone")
            return outputs

        return StepFuture(collect)

    def _until_frames_are_ready(self) -> None:
        """A step takes its time, in which the next frames are converted."""
        end = time.monotonic() + 0.05
        while time.monotonic() < end and not all(
            len(stream.incoming.converter._queue) == 2 or stream.incoming.reader.ended
            for stream in self.streams
            if stream.incoming.converter and stream.incoming.reader
        ):
            time.sleep(0.0002)

    def _waited(self) -> None:
        assert len(self.order) == self._begun, "a step under way writes these states"

    def read_state(self) -> dict[str, NDArray[Any]]:
        self._waited()
        return super().read_state()

    def reset(self, rows: Sequence[bool] | None = None) -> None:
        if hasattr(self, "order"):
            self._waited()
        super().reset(rows)


class Frames:
    """A sink that keeps its frames."""

    replaces = False

    def __init__(self, *, takes_pixels: bool, fails_at: int | None = None) -> None:
        self.name, self.takes_pixels = "frames", takes_pixels
        self.frames: list[NDArray[Any]] = []
        self._fails_at = fails_at

    def write(self, frame: NDArray[Any]) -> None:
        if len(self.frames) == self._fails_at:
            raise OutputError("frames: full")
        self.frames.append(frame.copy())

    def close(self) -> None: ...

    def salvage(self) -> int:
        return len(self.frames)

    def abandon(self) -> None: ...


class Plan:
    """Streams and what happens to them, drawn at random; `run` does the same each time."""

    def __init__(self, seed: int) -> None:
        draw = self._draw = np.random.default_rng(seed)
        self.count = int(draw.choice([1, 1, 2, 3]))
        self.floats = [bool(draw.random() < 0.7) for _ in range(self.count)]
        self.policies = [self._policy(floats) for floats in self.floats]
        self.clips = [self._clip(floats) for floats in self.floats]
        self.pixels = [bool(draw.random() < 0.4) for _ in range(self.count)]
        self.limits = [int(draw.integers(1, 14)) if draw.random() < 0.25 else None for _ in range(self.count)]
        self.fails = int(draw.integers(0, 40)) if draw.random() < 0.1 else None
        self.fails_at_once = bool(draw.random() < 0.5)
        self.every = int(draw.integers(1, 7))

    def _policy(self, floats: bool) -> ResetPolicy:
        every = int(self._draw.integers(1, 6)) if self._draw.random() < 0.3 else None
        cut = not floats and bool(self._draw.random() < 0.5)
        on_nonfinite = self._draw.choice(["stop", "reset", "reset", "ignore"])
        return ResetPolicy(every, None, cut, on_nonfinite, self._draw.choice(["stop", "reset"]))

    def _clip(self, floats: bool) -> list[Any]:
        clip: list[Any] = []
        size = (4, 4)
        for _ in range(int(self._draw.integers(0, 24))):
            kind = self._draw.random()
            if kind < 0.03 and self.count == 1:
                size = (4, 6) if size == (4, 4) else (4, 4)
            if not floats:
                frame: NDArray[Any] = self._draw.integers(0, 30, (*size, 3), np.uint8)
            else:
                frame = self._draw.integers(0, 9, (3, *size)).astype(np.float32)
                if kind > 0.95:
                    frame[0, 0, 0] = np.nan
                elif kind > 0.75:
                    frame[1, 2, 3] = 3e38  # finite, but its double is not
            clip.append(frame)
        if self._draw.random() < 0.15:
            clip.append(InputError("broken"))
        return clip

    def run(self, model: Path, folder: Path, *, overlaps: bool) -> tuple[dict[str, Any], Overlapping]:
        backend = Overlapping(model, overlaps=overlaps)
        if self.fails is not None:
            backend.fails, backend.fails_at_once = self.fails, self.fails_at_once
        sinks = [Frames(takes_pixels=pixels) for pixels in self.pixels]
        streams = [
            Stream(FrameSource(f"s{number}", clip), sink, reset=policy, limit=limit)
            for number, (clip, sink, policy, limit) in enumerate(
                zip(self.clips, sinks, self.policies, self.limits, strict=True)
            )
        ]
        backend.streams = streams if overlaps else ()
        path = folder / f"{overlaps}.safetensors"
        with StepLoop(backend, name="model", slots=self.count if self.count > 1 else None) as loop:
            snapshots = SnapshotWriter(path, self.every, ", ".join(stream.name for stream in streams))
            reports = Scheduler(LoopStepper(loop), streams, snapshots=snapshots).run()
            contract = loop.contract
        found: dict[str, Any] = {
            "frames": [[frame.tolist() for frame in sink.frames] for sink in sinks],
            "reports": [
                {name: value for name, value in msgspec.to_builtins(report).items() if name not in TIMES}
                for report in reports
            ],
        }
        # Which frames share a step depends on when they were read, and so does the last snapshot of a run that failed.
        if self.count > 1:
            for report in found["reports"]:
                del report["snapshots"], report["resumes_at"]
                if self.fails is not None:
                    report.clear()
            if self.fails is not None:
                return {}, backend
        if path.exists() and (self.count == 1 or not all(stream.failure for stream in streams)):
            states, snapshot = read_snapshot(path, contract)
            rows = sorted((snapshot.slots or {"": 0}).items())
            found["states"] = {name: [(slot, a[row].tolist()) for slot, row in rows] for name, a in states.items()}
            found["frame"] = snapshot.frame if self.count == 1 else None
        return found, backend


def test_steps_that_overlap_give_the_same_as_steps_that_do_not(
    accumulator: Model, tmp_path: Path, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random streams with NaN, resets, limits, errors, snapshots and devices that fail."""
    monkeypatch.setattr("stepcell.runtime.streams.scheduler.STATES_EVERY", 5)
    monkeypatch.setattr("stepcell.runtime.streams.scheduler.GATHER_SECONDS", 2.0)
    model = accumulator(range=(0.0, 255.0))
    ahead = repeated = 0
    for seed in range(60):
        plan = Plan(seed)
        (folder := tmp_path / str(seed)).mkdir()
        found, lines = [], []
        backends = []
        for overlaps in (False, True):
            logged.clear()
            results, backend = plan.run(model, folder, overlaps=overlaps)
            found.append(repr(results))  # NaN is not equal to itself
            messages = [record.getMessage() for record in logged.records if plan.fails is None]
            lines.append(messages if plan.count == 1 else sorted(messages))
            backends.append(backend)
        assert found[0] == found[1], f"seed {seed}"
        assert lines[0] == lines[1], f"seed {seed}"
        assert backends[0].ahead == 0
        ahead += backends[1].ahead
        repeated += len(backends[1].order) - len(backends[0].order)
    assert ahead > 100
    assert repeated > 5
    print(f"{ahead} steps were started ahead, {repeated} of them repeated")


ONE = np.ones((3, 4, 4), np.float32)


def begin(backend: Overlapping, clip: list[Any], **options: Any) -> tuple[StepLoop, Stream, Frames]:
    sink = Frames(takes_pixels=False)
    stream = Stream(FrameSource("s", clip), sink, **options)
    backend.streams = [stream]
    return StepLoop(backend, name="model"), stream, sink


def test_nearly_every_step_is_started_while_the_last_one_runs(accumulator: Model) -> None:
    backend = Overlapping(accumulator(), overlaps=True)
    loop, stream, sink = begin(backend, [ONE] * 60)
    (report,) = Scheduler(LoopStepper(loop), [stream]).run()
    assert [frame[0, 0, 0] for frame in sink.frames] == list(range(1, 61))
    assert backend.ahead >= 55
    assert backend.order == list(range(60))
    assert report.step.count == 59


def test_a_slow_input_holds_no_result_back(accumulator: Model) -> None:
    """A step is finished at once where no next frame is there."""
    backend = Overlapping(accumulator(), overlaps=True)
    gate = threading.Event()

    class Waiting(FrameSource):
        def __iter__(self) -> Iterator[NDArray[Any]]:
            yield ONE
            assert gate.wait(10), "the result of the first frame never came"
            yield ONE

    class Opening(Frames):
        def write(self, frame: NDArray[Any]) -> None:
            super().write(frame)
            gate.set()

    sink = Opening(takes_pixels=False)
    (report,) = Scheduler(LoopStepper(StepLoop(backend, name="model")), [Stream(Waiting("s", []), sink)]).run()
    assert (report.frames, backend.ahead) == (2, 0)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_device_that_fails_ends_the_run_at_that_frame(accumulator: Model, at_once: bool) -> None:
    backend = Overlapping(accumulator(), overlaps=True)
    backend.fails, backend.fails_at_once = 7, at_once
    loop, stream, _ = begin(backend, [ONE] * 20)
    (report,) = Scheduler(LoopStepper(loop), [stream]).run()
    assert (report.frames, report.written, report.stopped) == (7, 7, "error")
    assert ("refused" if at_once else "gone") in (report.error or "")


def test_a_stop_delivers_what_is_under_way(accumulator: Model, tmp_path: Path) -> None:
    control = RunControl()

    class Stopping:
        def step(self, seconds: float) -> None: ...
        def frame(self, stream: Stream, seconds: float) -> None:
            if stream.frames == 7:
                control.stop()

    backend = Overlapping(accumulator(), overlaps=True)
    loop, stream, sink = begin(backend, [ONE] * 50)
    snapshots = SnapshotWriter(tmp_path / "s.safetensors", 1000, "s")
    (report,) = Scheduler(LoopStepper(loop), [stream], control=control, times=Stopping(), snapshots=snapshots).run()
    assert report.stopped == "interrupted"
    assert report.frames == report.written == len(sink.frames) == report.resumes_at == len(backend.order) == 8
    states, _ = read_snapshot(tmp_path / "s.safetensors", loop.contract)
    assert states["h"][0, 0, 0, 0] == 8


def test_an_interrupt_writes_no_states_of_which_nobody_knows(accumulator: Model, tmp_path: Path) -> None:
    backend = Overlapping(accumulator(), overlaps=True)
    loop, stream, sink = begin(backend, [ONE] * 50)
    wait = backend._until_frames_are_ready

    def interrupted() -> None:
        wait()
        if len(backend.order) == 6:
            raise KeyboardInterrupt

    backend._until_frames_are_ready = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        Scheduler(LoopStepper(loop), [stream], snapshots=SnapshotWriter(tmp_path / "s.safetensors", 1000, "s")).run()
    assert (stream.frames, stream.stopped, len(sink.frames)) == (5, "interrupted", 5)
    assert not (tmp_path / "s.safetensors").exists()
