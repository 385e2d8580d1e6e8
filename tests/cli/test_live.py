"""`stepcell run` with several inputs, cameras, metrics and a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stepcell.models.zoo.clips import read_clip
from stepcell.runtime.media.open_source import open_source
from tests.cli.command import run

Model = Callable[..., Path]
STEPCELL = (sys.executable, "-c", "from stepcell.cli import main; main()")


@contextlib.contextmanager
def running(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a process, which is killed at the end of the test."""
    command = [*STEPCELL, "run", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def finished(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit code, and stderr as one line."""
    assert process.stderr is not None
    said = process.stderr.read().decode()
    return process.wait(60), " ".join(said.split())


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("a.npy", "b.npy", "c.npy")]
    for path, count in zip(paths, (12, 5, 9), strict=True):
        np.save(path, random.integers(0, 256, (count, 9, 7, 3), np.uint8))
    return paths


def each(option: str, values: list[Any]) -> list[Any]:
    return [word for value in values for word in (option, value)]


def test_several_clips_equal_runs_of_one(denoiser_onnx: Path, clips: list[Path], tmp_path: Path) -> None:
    alone = [tmp_path / f"alone{number}.npy" for number in range(3)]
    for clip, output in zip(clips, alone, strict=True):
        assert run(denoiser_onnx, "-i", clip, "-o", output, "--threads", 1).exit_code == 0
    outputs = [tmp_path / "out0.npy", tmp_path / "out1.npy", tmp_path / "out2.npy"]
    options = ["--threads", 1, "--report", tmp_path / "run.json", "--json"]
    result = run(denoiser_onnx, *each("-i", clips), *each("-o", outputs), *options)
    assert result.exit_code == 0
    for output, expected in zip(outputs, alone, strict=True):
        np.testing.assert_array_equal(np.load(output), np.load(expected))
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "run.json").read_text())
    assert [stream["frames"] for stream in report["streams"]] == [12, 5, 9]
    assert [stream["input"] for stream in report["streams"]] == [str(clip) for clip in clips]
    words = " ".join(result.stderr.split())
    assert "stream frames frames/s p50 ms p95 ms p99 ms" in words
    assert f"{clips[1]} 5 of 5" in words


def test_an_input_that_breaks_is_an_error_at_the_end(accumulator: Model, tmp_path: Path) -> None:
    whole, broken = np.zeros((20, 3, 8, 8), np.float32), np.zeros((9, 3, 8, 8), np.float32)
    broken[4] = np.nan
    np.save(tmp_path / "whole.npy", whole)
    np.save(tmp_path / "broken.npy", broken)
    inputs, outputs = ([tmp_path / f"{end}{name}.npy" for name in ("whole", "broken")] for end in ("", "out-"))
    result = run(accumulator(), *each("-i", inputs), *each("-o", outputs), "--report", tmp_path / "run.json")
    assert result.exit_code == 1
    words = " ".join(result.stderr.split())
    assert f"1 of 2 streams failed: {inputs[1]}: " in words
    assert "NaN" in words
    assert [len(np.load(output)) for output in outputs] == [20, 4]
    streams = json.loads((tmp_path / "run.json").read_text())["streams"]
    assert [stream["stopped"] for stream in streams] == ["end of input", "error"]


def test_the_same_input_twice(accumulator: Model, clips: list[Path], tmp_path: Path) -> None:
    result = run(accumulator(), "-i", clips[1], "-i", clips[1], "--metrics-port", 0)
    assert result.exit_code == 0
    assert f"{clips[1]}#2" in "".join(result.stderr.split("\n"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_finishes_three_outputs(
    accumulator: Model, camera: Any, clip_path: Path, tmp_path: Path, number: int, code: int
) -> None:
    """A file that has ended, a camera that does not end and a pipe that stays open."""
    outputs = [tmp_path / "file.mp4", tmp_path / "camera.npy", tmp_path / "pipe"]
    arguments = [accumulator(range=(0.0, 1.0)), *each("-i", [clip_path, camera.url, "-"]), *each("-o", outputs)]
    arguments += ["--size", "176x144", "--reconnect", "inf", "--report", tmp_path / "run.json"]
    with running(*arguments) as process:
        assert process.stdin is not None
        process.stdin.write(read_clip("carphone_pristine")[:10].tobytes())
        process.stdin.flush()
        deadline = time.monotonic() + 30
        while camera.connections < 3 or len(list(tmp_path.glob(".pipe*/*"))) < 10:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        found, said = finished(process)
    assert found == code, said
    assert "Traceback" not in said
    assert "Fatal" not in said
    streams = json.loads((tmp_path / "run.json").read_text())["streams"]
    assert [stream["frames"] for stream in streams[::2]] == [120, 10]
    assert streams[1]["frames"] >= 60
    assert streams[1]["reconnects"] >= 1
    # The first frames after the last reconnection may still wait to be stepped.
    assert streams[1]["reconnects"] - streams[1]["resets"]["gap"] in (0, 1)
    assert len(np.load(outputs[1])) == streams[1]["frames"]
    assert [len(list(open_source(str(path)))) for path in (outputs[0], outputs[2])] == [120, 10]
    assert {stream["stopped"] for stream in streams[1:]} == {"interrupted"}
    assert not list(tmp_path.glob(".*"))


def scrape(url: str) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(url, timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    # Name, stream if there is one, second label.
    return {
        (sample.name, *(label for _, label in sorted(sample.labels.items(), key=lambda each: each[0] != "stream"))): (
            sample.value
        )
        for sample in samples
    }


def seen(found: dict[tuple[str, ...], float], stream: str) -> float:
    """Frames of a stream that were stepped or dropped."""
    names = ("stepcell_frames_total", "stepcell_dropped_frames_total")
    return sum(value for key, value in found.items() if key[0] in names and key[1] == stream)


def test_metrics_during_a_run_agree_with_its_report(accumulator: Model, clip_path: Path, tmp_path: Path) -> None:
    arguments = [accumulator(), "-i", clip_path, "-i", "-", "--size", "176x144", "--metrics-port", 0]
    arguments += ["--report", tmp_path / "run.json", "--reset-every", 25, "--deadline-ms", 10_000]
    frames = read_clip("carphone_pristine")[:37]
    with running(*arguments) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        said = ""
        while "/metrics" not in said:
            said += process.stderr.readline().decode()
        url = re.search(r"http://127.0.0.1:\d+/metrics", said)
        assert url is not None
        process.stdin.write(frames.tobytes())
        process.stdin.flush()
        name, deadline, found = str(clip_path), time.monotonic() + 30, scrape(url[0])
        while found.get(("stepcell_stream_up", name)) != 0 or seen(found, "-") != 37:
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
            found = scrape(url[0])
        assert found["stepcell_stream_up", "-"] == 1
        process.stdin.close()
        code, said = finished(process)
    assert code == 0, said
    file, pipe = json.loads((tmp_path / "run.json").read_text())["streams"]
    for stream, label in ((file, name), (pipe, "-")):
        assert found["stepcell_frames_total", label] == stream["frames"]
        assert found["stepcell_frame_seconds_count", label] == stream["latency"]["count"] + 1
        assert found["stepcell_resets_total", label, "every"] == stream["resets"]["every"]
        for reason in ("late", "queue full"):
            assert found["stepcell_dropped_frames_total", label, reason] == stream["dropped"][reason]
        assert found["stepcell_reconnects_total", label] == stream["reconnects"] == 0
        assert found["stepcell_non_finite_total", label] == stream["non_finite"] == 0
    assert found["stepcell_step_seconds_count",] == file["step"]["count"] + 1
    assert (file["frames"], pipe["frames"] + sum(pipe["dropped"].values())) == (120, 37)
    assert file["resets"]["every"] == 4


def test_a_camera_is_reconnected_to(accumulator: Model, camera: Any, tmp_path: Path) -> None:
    camera.cut = 0.5
    output = tmp_path / "out.npy"
    result = run(accumulator(), "-i", camera.url, "-o", output, "--reconnect", 20, "--limit", 70, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["frames"], report["stopped"], len(np.load(output))) == (70, "limit", 70)
    assert report["reconnects"] == report["resets"]["gap"] == 2
    assert f"{camera.url}: lost (the stream ended); reconnecting" in " ".join(result.stderr.split())


def test_without_reconnect_a_lost_camera_ends_the_run(accumulator: Model, camera: Any) -> None:
    result = run(accumulator(), "-i", camera.url, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["stopped"] == "end of input"
    camera.switch_off()
    assert run(accumulator(), "-i", camera.url).exit_code == 1


def test_a_camera_that_is_off_holds_up_no_other(accumulator: Model, camera: Any, clips: list[Path]) -> None:
    camera.switch_off()
    result = run(accumulator(), "-i", clips[0], "-i", camera.url, "--reconnect", 0.5, "--json")
    assert result.exit_code == 1
    streams = json.loads(result.stdout)["streams"]
    assert [(stream["frames"], stream["stopped"]) for stream in streams] == [(12, "end of input"), (0, "error")]
    assert "lost and not reconnected within 0.5 s" in streams[1]["error"]


def test_several_clips_are_resumed(accumulator: Model, clips: list[Path], tmp_path: Path) -> None:
    model = accumulator()
    run(model, *each("-i", clips), *each("-o", [tmp_path / f"whole{n}.npy" for n in range(3)]))
    pieces: list[list[Any]] = [[], [], []]
    for piece in range(3):
        outputs = [tmp_path / f"{n}-{piece}.npy" for n in range(3)]
        options = ["--snapshot", tmp_path / "state.safetensors", "--resume", "--limit", 5]
        result = run(model, *each("-i", clips), *each("-o", outputs), *options)
        assert result.exit_code == 0, result.stderr
        for number, output in enumerate(outputs):
            if output.exists():
                pieces[number].append(np.load(output))
    assert "resuming at frame 10 of" in " ".join(result.stderr.split())
    for number, parts in enumerate(pieces):
        np.testing.assert_array_equal(np.concatenate(parts), np.load(tmp_path / f"whole{number}.npy"))
    result = run(model, "-i", clips[0], *options)
    assert result.exit_code == 1
    assert "was taken from a loop with slots=3" in " ".join(result.stderr.split())


def test_the_view_on_a_terminal(accumulator: Model, clip_path: Path) -> None:
    """The live table of two clips: a row each with its percentiles."""
    main_end, run_end = pty.openpty()
    command = [*STEPCELL, "run", str(accumulator()), "-i", str(clip_path), "-i", str(clip_path)]
    environment = {**os.environ, "COLUMNS": "150", "TERM": "xterm-256color"}
    with subprocess.Popen(command, stderr=run_end, env=environment) as process:
        os.close(run_end)
        seen = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(main_end, 65536):
                seen += part
        assert process.wait(30) == 0
    os.close(main_end)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert re.search(r"stream +frames +frames/s +p50 ms +p95 ms +p99 ms +queue +dropped +resets", text)
    assert re.search(r" 120 of 120 +\d+\.\d +\d+\.\d +\d+\.\d +\d+\.\d +\d\+\d +0 +0 +0 +end of input", text)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-i", "A", "-i", "B", "-o", "x.npy"], 2, "--output: 1 for 2 inputs"),
        (["-i", "A", "-i", "B", "-o", "x.npy", "-o", "x.npy"], 2, "also used as --output"),
        (["-i", "A", "-i", "B", "-o", "x.npy", "-o", "A"], 2, "also used as --input"),
        (["-i", "-", "-i", "-", "--size", "4x4"], 2, "--input -: given 2 times"),
        (["-i", "A", "-i", "B", "-o", "-", "-o", "-"], 2, "--output -: given 2 times"),
        (["-i", "A", "-i", "nothing.mp4"], 1, "nothing.mp4: cannot be read"),
        (["-i", "A", "-i", "B", "-o", "x.npy", "-o", "none/x.npy"], 1, "none/x.npy: cannot be written"),
        (["-i", "A", "--metrics-port", "http"], 2, "--metrics-port: expected"),
        (["-i", "A", "--deadline-ms", "0"], 2, "--deadline-ms"),
        (["-i", "A", "--on-late", "wait"], 2, "--on-late"),
        (["-i", "A", "--reconnect", "-1"], 2, "--reconnect"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes(
    accumulator: Model,
    clips: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    model = accumulator()
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    names = {"A": str(clips[0]), "B": str(clips[1])}
    result = run(model, *(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == code, result.stderr
    assert message in " ".join(result.stderr.split())
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


def test_a_batch_of_another_size(denoiser_onnx_fixed: Path, clips: list[Path]) -> None:
    result = run(denoiser_onnx_fixed, "-i", clips[0], "-i", clips[1])
    assert result.exit_code == 2
    assert "--dynamic batch" in " ".join(result.stderr.split())
