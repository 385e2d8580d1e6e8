"""`stepcell run` with one input."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from stepcell.models.zoo.clips import clip_path as find_clip
from stepcell.runtime.media.open_source import open_source
from tests.cli.command import run

Model = Callable[..., Path]
STEPCELL = (sys.executable, "-c", "from stepcell.cli import main; main()")


@pytest.fixture
def small_clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (12, 9, 7, 3), np.uint8))
    return path


def test_clip_to_video_with_a_report(denoiser_onnx: Path, clip_path: Path, tmp_path: Path) -> None:
    result = run(denoiser_onnx, "-i", clip_path, "-o", tmp_path / "out.mp4", "--report", tmp_path / "run.json")
    assert result.exit_code == 0
    assert result.stdout == ""
    words = " ".join(result.stderr.split())
    assert "ONNX Runtime" in words
    assert "first mean p50 p90 p95 p99 max" in words
    assert "120 frames of 176x144" in words
    source = open_source(str(tmp_path / "out.mp4"))
    assert source.fps == pytest.approx(29.97, abs=0.01)
    assert np.stack(list(source)).shape == (120, 144, 176, 3)
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["frames"] == 120
    assert report["device"] == "cpu"
    assert report["step"]["p99_ms"] >= report["step"]["p50_ms"] > 0


def test_json_on_stdout_and_no_output(accumulator: Model, small_clip: Path) -> None:
    result = run(accumulator(), "-i", small_clip, "--limit", 5, "--reset-every", 2, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["frames"], report["resets"]["every"], report["stopped"], report["output"]) == (5, 2, "limit", None)


@pytest.mark.parametrize("rate", ["50", "29.97", "30000/1001"])
def test_rate_of_the_output(accumulator: Model, small_clip: Path, tmp_path: Path, rate: str) -> None:
    assert run(accumulator(), "-i", small_clip, "-o", tmp_path / "out.mp4", "--fps", rate).exit_code == 0
    expected = 29.97 if "/" in rate else float(rate)
    assert open_source(str(tmp_path / "out.mp4")).fps == pytest.approx(expected, rel=1e-3)


def test_raw_frames_through_a_pipe(accumulator: Model) -> None:
    frames = np.arange(3 * 4 * 6 * 3, dtype=np.uint8).reshape(3, 4, 6, 3) // 4
    command = [*STEPCELL, "run", str(accumulator()), "-i", "-", "-o", "-", "--size", "6x4"]
    done = subprocess.run(command, input=frames.tobytes(), capture_output=True, timeout=120, check=True)
    expected = np.clip(np.cumsum(frames.astype(int), axis=0), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.uint8).reshape(frames.shape), expected)


def test_reader_of_the_pipe_goes_away(accumulator: Model) -> None:
    command = [*STEPCELL, "run", str(accumulator()), "-i", "-", "-o", "-", "--size", "64x64"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(bytes(64 * 64 * 3))
    process.stdin.flush()
    process.stdout.read(10)
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # it may exit before it has read everything
        process.stdin.write(bytes(64 * 64 * 3 * 30))
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(120) == 1
    assert "stdout: cannot be written (Broken pipe)" in " ".join(errors.split())
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_half_way_leaves_a_playable_file(accumulator: Model, tmp_path: Path, number: int, code: int) -> None:
    output, report = tmp_path / "out.mp4", tmp_path / "run.json"
    command = [*STEPCELL, "run", str(accumulator(range=(0.0, 1.0))), "-i", "-", "--size", "64x48"]
    command += ["-o", str(output), "--report", str(report)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stderr is not None
    frame = bytes(64 * 48 * 3)
    for _ in range(40):  # more than a pipe buffers, so most have been read when this returns
        process.stdin.write(frame)
    process.stdin.flush()
    process.send_signal(number)  # stdin stays open, so the stream is interrupted
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(120) == code, errors
    process.stdin.close()
    assert "Traceback" not in errors
    frames = len(list(open_source(str(output))))
    assert 20 <= frames <= 40
    summary = json.loads(report.read_text())
    assert (summary["frames"], summary["stopped"]) == (frames, "interrupted")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_killed_and_resumed_equals_an_uninterrupted_run(denoiser_onnx: Path, clip_path: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a real clip, with all reset policies; results are compared bit by bit."""
    snapshot, report = tmp_path / "state.safetensors", tmp_path / "run.json"
    command = [*STEPCELL, "run", str(denoiser_onnx), "-i", str(clip_path), "--threads", "1", "--report", str(report)]
    command += ["--reset-every", "50", "--reset-on-cut", "--reset-gap", "1"]
    subprocess.run([*command, "-o", str(tmp_path / "whole.npy")], check=True, capture_output=True, timeout=120)
    whole = np.load(tmp_path / "whole.npy")
    command += ["--snapshot", str(snapshot), "--snapshot-every", "7", "--resume"]

    with subprocess.Popen([*command, "-o", str(tmp_path / "killed.npy")], stderr=subprocess.PIPE) as process:
        while not snapshot.exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed.npy").exists()

    done = subprocess.run([*command, "-o", str(tmp_path / "rest.npy")], check=True, capture_output=True, timeout=120)
    start = json.loads(report.read_text())["first_frame"]
    assert start % 7 == 0
    assert 7 <= start < len(whole), "killed before its end"
    assert f"resuming at frame {start} of {clip_path}" in " ".join(done.stderr.decode().split())
    np.testing.assert_array_equal(np.load(tmp_path / "rest.npy"), whole[start:])
    assert json.loads(report.read_text())["resets"]["every"] == len([n for n in (50, 100) if n >= start])

    again = subprocess.run(command, check=True, capture_output=True, timeout=120)  # no frame is left
    assert json.loads(report.read_text())["frames"] == 0
    assert b"resuming at frame 120" in again.stderr


def test_limit_and_resume_go_through_a_clip_piece_by_piece(
    accumulator: Model, small_clip: Path, tmp_path: Path
) -> None:
    model = accumulator()
    run(model, "-i", small_clip, "-o", tmp_path / "whole.npy")
    pieces = []
    for piece in range(3):
        output = tmp_path / f"{piece}.npy"
        options = ["--snapshot", tmp_path / "state.safetensors", "--resume", "--limit", 5]
        assert run(model, "-i", small_clip, "-o", output, *options).exit_code == 0
        pieces.append(np.load(output))
    assert [len(piece) for piece in pieces] == [5, 5, 2]
    np.testing.assert_array_equal(np.concatenate(pieces), np.load(tmp_path / "whole.npy"))


def test_snapshot_of_another_model(accumulator: Model, denoiser_onnx: Path, small_clip: Path, tmp_path: Path) -> None:
    options = ["-i", small_clip, "--snapshot", tmp_path / "state.safetensors", "--resume"]
    assert run(accumulator(), *options).exit_code == 0
    result = run(denoiser_onnx, *options)
    assert result.exit_code == 1
    assert "a snapshot of another model" in " ".join(result.stderr.split())


def test_cuts_of_a_real_clip_are_in_the_report(accumulator: Model) -> None:
    result = run(accumulator(), "-i", find_clip("bikes"), "--reset-on-cut", "--reset-gap", 1, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["resets"] == {
        "every": 0,
        "gap": 0,
        "cut": 5,
        "size": 0,
        "demand": 0,
        "non-finite": 0,
    }
    assert "frame 76: states reset (cut)" in result.stderr
    assert "resets: 5 cut" in result.stderr


def test_sigusr1_forgets_the_past(accumulator: Model) -> None:
    command = [*STEPCELL, "run", str(accumulator()), "-i", "-", "--size", "64x64", "-o", "-"]
    frame = b"\x01" * (64 * 64 * 3)  # more than stdout buffers
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        found = []
        for number in range(4):
            if number == 2:
                process.send_signal(signal.SIGUSR1)
            process.stdin.write(frame)
            process.stdin.flush()
            found.append(process.stdout.read(len(frame))[0])
        process.stdin.close()
        errors = process.stderr.read().decode()
        assert process.wait(60) == 0
    assert found == [1, 2, 1, 2]
    assert "frame 2: states reset (demand)" in errors


def test_broken_clip_keeps_what_was_written(accumulator: Model, tmp_path: Path) -> None:
    clip = np.zeros((6, 3, 8, 8), np.float32)
    clip[4] = np.nan
    np.save(tmp_path / "clip.npy", clip)
    result = run(accumulator(), "-i", tmp_path / "clip.npy", "-o", tmp_path / "out", "--report", tmp_path / "run.json")
    assert result.exit_code == 1
    assert "holds the 4 frames before it" in " ".join(result.stderr.split())
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert "NaN" in json.loads((tmp_path / "run.json").read_text())["error"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-i", "nothing.mp4"], 1, "nothing.mp4: cannot be read"),
        (["-i", "camera:999"], 1, "camera:999: cannot be opened as camera"),
        (["-i", "-"], 2, "--size"),
        (["-i", "-", "--size", "huge"], 2, "--size: expected WIDTHxHEIGHT"),
        (["-i", "CLIP", "--size", "4x4"], 2, "--size"),
        (["-i", "CLIP", "-o", "CLIP"], 2, "also used as --input"),
        (["-i", "CLIP", "-o", "FOLDER/../clip.npy"], 2, "also used as --input"),
        (["-i", "CLIP", "--report", "CLIP"], 2, "also used as --input"),
        (["-i", "CLIP", "--report", "MODEL"], 2, "also used as the model"),
        (["-i", "CLIP", "-o", "o.npy", "--report", "o.npy"], 2, "also used as --output"),
        (["-i", "CLIP", "--report", "none/run.json"], 1, "its folder does not exist"),
        (["-i", "CLIP", "-o", "none/out.mp4"], 1, "none/out.mp4: cannot be written"),
        (["-i", "CLIP", "-o", "out.gif"], 2, "--output: expected"),
        (["-i", "CLIP", "-o", "-", "--json"], 2, "both write to stdout"),
        (["-i", "CLIP", "--reset-gap", "1"], 1, "frame 0: has no timestamp"),
        (["-i", "CLIP", "--reset-gap", "0"], 2, "--reset-gap"),
        (["-i", "CLIP", "--resume"], 2, "need --snapshot FILE"),
        (["-i", "CLIP", "--snapshot-every", "3"], 2, "need --snapshot FILE"),
        (["-i", "CLIP", "--snapshot", "CLIP"], 2, "also used as --input"),
        (["-i", "CLIP", "--snapshot", "none/s.safetensors"], 1, "its folder does not exist"),
        (["-i", "CLIP", "--snapshot", "CLIP", "--resume"], 2, "also used as --input"),
        (["-i", "CLIP", "--on-nonfinite", "panic"], 2, "--on-nonfinite"),
        (["-i", "CLIP", "--fps", "0"], 2, "--fps: expected"),
        (["-i", "CLIP", "--fps", "fast"], 2, "--fps: expected"),
        (["-i", "CLIP", "--limit", "0"], 2, "--limit"),
        (["-i", "CLIP", "--device", "gpu"], 2, "expected cpu, cuda or cuda:N"),
        (["-i", "CLIP", "--device", "cuda:99"], 6, "cuda:99"),
        ([], 2, "--input"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused_requests(
    accumulator: Model, small_clip: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    model = accumulator()
    (tmp_path / "folder").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = {"CLIP": str(small_clip), "MODEL": str(model), "FOLDER": str(tmp_path / "folder")}
    filled = []
    for argument in arguments:
        for word, name in names.items():
            argument = argument.replace(word, name)
        filled.append(argument)
    result = run(model, *filled)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_grey_clip_for_a_colour_model(accumulator: Model, tmp_path: Path) -> None:
    np.save(tmp_path / "grey.npy", np.zeros((2, 8, 8, 1), np.uint8))
    result = run(accumulator(), "-i", tmp_path / "grey.npy", "-o", tmp_path / "out.mp4")
    assert result.exit_code == 1
    assert "the model takes colour (3 channels), the frames are greyscale" in " ".join(result.stderr.split())
    assert not (tmp_path / "out.mp4").exists()


def test_fixed_model_says_how_to_export(denoiser_onnx_fixed: Path, clip_path: Path) -> None:
    result = run(denoiser_onnx_fixed, "-i", clip_path)
    assert result.exit_code == 1
    assert "exported for 96x64 frames, got 176x144" in " ".join(result.stderr.split())
    assert "--dynamic height,width" in result.stderr


def test_help_has_examples() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "stepcell run model.onnx --input clip.mp4 --output out.mp4" in result.stdout


def test_run_needs_no_torch(accumulator: Model, small_clip: Path) -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['triton'] = None\nfrom stepcell.cli import main; main()"
    command = [sys.executable, "-c", code, "run", str(accumulator()), "-i", str(small_clip)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)


def test_no_output_replaces_a_checkpoint_a_model_or_a_snapshot(
    accumulator: Model, small_clip: Path, tmp_path: Path
) -> None:
    model = accumulator()
    checkpoint = tmp_path / "net.safetensors"
    checkpoint.write_bytes(save({"w": np.zeros(4, np.float32)}))
    snapshot = tmp_path / "state.safetensors"
    assert run(model, "-i", small_clip, "--snapshot", snapshot).exit_code == 0
    os.link(small_clip, tmp_path / "hard.npy")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    refused: list[tuple[str, Path]] = [
        *(("--snapshot", path) for path in (checkpoint, model, small_clip)),
        *(("--report", path) for path in (checkpoint, model, small_clip, snapshot)),
        ("--output", tmp_path / "hard.npy"),
    ]
    for option, path in refused:
        result = run(model, "-i", small_clip, option, path)
        assert result.exit_code == 2, (option, path, result.output)
    (tmp_path / "other.npy").write_bytes(checkpoint.read_bytes())
    assert run(model, "-i", small_clip, "-o", tmp_path / "other.npy").exit_code == 2
    assert all(path.read_bytes() == data for path, data in before.items())
    assert run(model, "-i", small_clip, "--snapshot", checkpoint, "--overwrite").exit_code == 0
    assert run(model, "-i", small_clip, "--snapshot", small_clip, "--overwrite").exit_code == 2
