"""run_streams with the names of a model, inputs and outputs, as a Python program calls it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell import StepLoop
from stepcell.errors import InputError, OutputError, UsageError
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.streams.metrics import Metrics
from stepcell.runtime.streams.open_streams import stream_names
from stepcell.runtime.streams.progress import RunProgress
from stepcell.runtime.streams.report import RunError
from stepcell.runtime.streams.run import run_streams
from stepcell.runtime.streams.run_control import RunControl

Model = Callable[..., Path]


def save(path: Path, count: int, value: float = 1.0) -> Path:
    np.save(path, np.full((count, 3, 4, 4), value, np.float32))
    return path


def first_values(path: Path) -> list[float]:
    values: list[float] = np.load(path)[:, 0, 0, 0].tolist()
    return values


def test_one_input_by_its_name(accumulator: Model, tmp_path: Path) -> None:
    clip = save(tmp_path / "clip.npy", 5)
    report = run_streams(str(accumulator()), str(clip), str(tmp_path / "out.npy"), reset_every=3)
    (stream,) = report.streams
    assert (stream.frames, stream.stopped, stream.input) == (5, "end of input", str(clip))
    assert first_values(tmp_path / "out.npy") == [1, 2, 3, 1, 2]
    assert report.model == stream.model == str(accumulator())


def test_nothing_is_printed_and_torch_is_not_needed(accumulator: Model, tmp_path: Path) -> None:
    clip = save(tmp_path / "clip.npy", 2)
    program = "import sys; sys.modules['torch'] = None; from stepcell import run_streams; run_streams(*sys.argv[1:])"
    command = [sys.executable, "-c", program, str(accumulator()), str(clip), str(tmp_path / "out.npy")]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert done.stdout + done.stderr == b""
    assert first_values(tmp_path / "out.npy") == [1, 2]


def test_options_for_cameras_without_one(accumulator: Model, tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    clips = [save(tmp_path / f"{name}.npy", 2) for name in "ab"]
    run_streams(accumulator(), clips, reconnect=5, deadline_ms=10)
    said = [text for text in logged.messages if "has no effect" in text]
    assert said == [
        "--reconnect: has no effect: no input is a camera or URL",
        "--deadline-ms: has no effect: frames of files are never late",
    ]


def test_several_inputs_of_every_form(accumulator: Model, tmp_path: Path) -> None:
    clips = [save(tmp_path / f"{name}.npy", count) for name, count in (("a", 6), ("b", 3), ("c", 4))]
    inputs = [clips[0], open_source(str(clips[1])), str(clips[2])]
    outputs = [tmp_path / "out0.npy", None, ArraySink(tmp_path / "out2.npy")]
    seen: list[int] = []
    report = run_streams(
        accumulator(), inputs, outputs, limit=5, progress=lambda run: seen.append(sum(s.frames for s in run.streams))
    )
    assert [(stream.frames, stream.stopped) for stream in report.streams] == [
        (5, "limit"),
        (3, "end of input"),
        (4, "end of input"),
    ]
    assert [stream.written for stream in report.streams] == [5, None, 4]
    assert first_values(tmp_path / "out0.npy") == [1, 2, 3, 4, 5]
    assert first_values(tmp_path / "out2.npy") == [1, 2, 3, 4]
    assert (seen[0], seen[-1]) == (0, 12)
    assert seen == sorted(seen)


def test_progress_has_the_counters_of_the_report(accumulator: Model, tmp_path: Path) -> None:
    last: list[RunProgress] = []
    clips = [save(tmp_path / "a.npy", 6), save(tmp_path / "a2.npy", 3)]
    report = run_streams(accumulator(), clips, reset_every=2, limit=4, progress=lambda run: last.append(run))
    for live, final in zip(last[-1].streams, report.streams, strict=True):
        assert (live.name, live.frames, live.stopped) == (final.input, final.frames, final.stopped)
        assert live.resets == final.resets
        assert live.seconds == pytest.approx(final.seconds, abs=1e-3)
        assert live.latency.summary() == final.latency
        assert not live.running
    assert [live.total for live in last[0].streams] == [4, 3]
    assert last[-1].step.summary() == report.streams[0].step


def test_a_broken_input_is_an_error_with_the_report(accumulator: Model, tmp_path: Path) -> None:
    whole, bad = save(tmp_path / "whole.npy", 6), tmp_path / "bad.npy"
    np.save(bad, np.stack([np.ones((3, 4, 4), np.float32), np.full((3, 4, 4), np.nan, np.float32)]))
    outputs = [tmp_path / "out0.npy", tmp_path / "out1.npy"]
    with pytest.raises(
        RunError, match=r"1 of 2 streams failed:\n.*bad\.npy: frame 1: x: 48 of 48 values are NaN"
    ) as caught:
        run_streams(accumulator(), [whole, bad], outputs, report=tmp_path / "run.json")
    report = caught.value.report
    assert [(stream.frames, stream.stopped) for stream in report.streams] == [(6, "end of input"), (1, "error")]
    assert [len(np.load(output)) for output in outputs] == [6, 1]
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads(report.to_json())
    with pytest.raises(RunError, match=r"48 values are NaN") as alone:
        run_streams(accumulator(), bad)
    assert isinstance(alone.value.__cause__, InputError)
    assert alone.value.exit_code == 1


def test_an_input_that_is_not_there_opens_no_output(accumulator: Model, tmp_path: Path) -> None:
    model, clip = accumulator(), save(tmp_path / "clip.npy", 2)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"none\.npy: cannot be read"):
        run_streams(model, [clip, tmp_path / "none.npy"], [tmp_path / "a.npy", tmp_path / "b.npy"])
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_is_resumed_in_another_loop(accumulator: Model, tmp_path: Path) -> None:
    model = accumulator()
    clips = [save(tmp_path / "a.npy", 7), save(tmp_path / "b.npy", 5)]
    found: list[list[float]] = [[], []]
    for piece in range(3):
        outputs = [tmp_path / f"{number}-{piece}.npy" for number in range(2)]
        report = run_streams(model, clips, outputs, limit=3, snapshot=tmp_path / "s.safetensors", resume=True)
        for number, output in enumerate(outputs):
            if output.exists():
                found[number] += first_values(output)
    assert [stream.first_frame for stream in report.streams] == [6, 5]
    assert found == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5]]


def test_another_thread_stops_it(accumulator: Model, tmp_path: Path) -> None:
    control, begun = RunControl(), threading.Event()

    def stop() -> None:
        begun.wait(30)
        control.stop()

    def progress(run: RunProgress) -> None:
        if run.streams[0].frames >= 10:
            begun.set()

    thread = threading.Thread(target=stop)
    thread.start()
    clip = save(tmp_path / "clip.npy", 50_000)
    report = run_streams(accumulator(), clip, tmp_path / "out.npy", control=control, progress=progress)
    thread.join()
    (stream,) = report.streams
    assert (stream.stopped, stream.error) == ("interrupted", None)
    assert 10 <= stream.frames == len(np.load(tmp_path / "out.npy")) < 50_000


def test_an_open_loop_stays_open(accumulator: Model, tmp_path: Path) -> None:
    clip = save(tmp_path / "clip.npy", 3)
    with StepLoop.open(accumulator()) as loop:
        for _ in range(2):
            run_streams(loop, clip, tmp_path / "out.npy")
            assert first_values(tmp_path / "out.npy") == [1, 2, 3]
        assert loop.state()["h"].max() == 3


def test_metrics_of_a_server_or_a_port(accumulator: Model, tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    clip = save(tmp_path / "clip.npy", 3)
    with Metrics(0) as metrics:
        run_streams(accumulator(), clip, metrics=metrics)
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        assert f'stepcell_frames_total{{stream="{clip}"}} 3.0' in text
        with pytest.raises(OutputError, match="cannot listen"):
            run_streams(accumulator(), clip, metrics=metrics.port)
    run_streams(accumulator(), clip, metrics=metrics.port)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit: expected 1 or more, got 0"),
        ({"snapshot": "s.safetensors", "snapshot_every": 0}, "snapshot_every: expected 1 or more"),
        ({"reset_gap": float("nan")}, "reset_gap: expected a number above zero, got nan"),
        ({"deadline_ms": -1}, "deadline_ms: expected a number above zero"),
        ({"reconnect": float("nan")}, "reconnect: expected"),
        ({"fps": 0}, "fps: expected 0.001 to 1000"),
        ({"on_late": "wait"}, "on_late: expected drop or block, got 'wait'"),
        ({"on_nonfinite": "panic"}, "on_nonfinite: expected stop, reset or ignore, got 'panic'"),
        ({"resume": True}, "need --snapshot"),
        ({"outputs": ["a.npy", "b.npy"]}, "2 for 1 inputs"),
        ({"device": "gpu"}, "expected cpu, cuda or cuda:N"),
        ({"event_window": "5ms"}, "takes pictures, not events"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_options_that_are_refused(
    accumulator: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model, clip = accumulator(), save(tmp_path / "clip.npy", 2)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=message):
        run_streams(model, clip, **options)
    assert sorted(tmp_path.iterdir()) == before


def test_a_device_for_an_open_loop_is_refused(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator()) as loop, pytest.raises(UsageError, match="device"):
        run_streams(loop, save(tmp_path / "clip.npy", 2), device="cuda")


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", Path("a"), "a"], ["a", "a#2", "a#3"]),
        (["a#2", "a", "a"], ["a#2", "a", "a#3"]),
        (["a", "a", "a#2"], ["a", "a#2", "a#2#2"]),
    ],
    ids=str,
)
def test_every_stream_has_a_name_of_its_own(inputs: list[str | Path], expected: list[str]) -> None:
    assert stream_names(inputs) == expected
