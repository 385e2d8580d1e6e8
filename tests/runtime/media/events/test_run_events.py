"""`stepcell run` with an event file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from stepcell.cli import main
from stepcell.runtime.media.events import Events, write_dat
from stepcell.runtime.media.open_source import open_source

SIZE = (48, 32)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """5000 events over a quarter of a second."""
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(0, 250_000, 5000))
    t[0], t[-1] = 0, 249_999
    events = Events.of(rng.integers(0, SIZE[0], 5000), rng.integers(0, SIZE[1], 5000), rng.integers(0, 2, 5000), t)
    write_dat(tmp_path / "events.dat", [events], SIZE)
    np.savez(tmp_path / "events.npz", **{name: getattr(events, name) for name in "xypt"})
    return tmp_path / "events.dat"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["run", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_events_to_a_video(firenet_onnx: Path, recording: Path, tmp_path: Path) -> None:
    result = run(
        firenet_onnx, "--input", recording, "--event-window", "10ms", "--output", tmp_path / "out.mp4", "--json"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["frames"], report["frame_size"]) == (25, [48, 32])
    video = open_source(str(tmp_path / "out.mp4"))
    assert video.fps == 100
    assert np.stack(list(video)).shape == (25, 32, 48, 3)
    video.close()


@pytest.mark.parametrize(("window", "frames"), [("50ms", 5), ("400events", 12), ("0.5events/pixel", 6)])
def test_a_window_of_its_own(firenet_onnx: Path, recording: Path, window: str, frames: int) -> None:
    result = run(firenet_onnx, "--input", recording, "--event-window", window, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["frames"] == frames


def test_a_size_for_a_file_that_has_none(firenet_onnx: Path, recording: Path, tmp_path: Path) -> None:
    npz = recording.with_suffix(".npz")
    assert run(firenet_onnx, "--input", npz).exit_code == 2
    whole = run(firenet_onnx, "--input", npz, "--size", "48x32", "--output", tmp_path / "npz.npy")
    assert whole.exit_code == 0, whole.output
    run(firenet_onnx, "--input", recording, "--output", tmp_path / "dat.npy")
    assert np.array_equal(np.load(tmp_path / "npz.npy"), np.load(tmp_path / "dat.npy"))


def test_a_broken_file_keeps_what_was_made_of_it(firenet_onnx: Path, recording: Path, tmp_path: Path) -> None:
    recording.write_bytes(recording.read_bytes()[:-3])
    result = run(firenet_onnx, "--input", recording, "--event-window", "10ms", "--output", tmp_path / "out.npy")
    assert result.exit_code == 1
    assert "truncated: ends 5 bytes into a record of 8" in " ".join(result.stderr.split())
    assert len(np.load(tmp_path / "out.npy")) == 24


def test_what_does_not_fit(firenet_onnx: Path, recording: Path, denoiser_onnx: Path) -> None:
    assert run(firenet_onnx, "--input", recording, "--event-window", "30").exit_code == 2
    pictures = run(denoiser_onnx, "--input", recording)
    assert pictures.exit_code == 1
    assert "the model takes pictures" in pictures.stderr
    assert run(denoiser_onnx, "--input", recording, "--event-window", "5ms").exit_code == 2
    cuts = run(firenet_onnx, "--input", recording, "--reset-on-cut")
    assert cuts.exit_code == 2
    assert "events have no scene cuts" in cuts.stderr
    for option in (["--on-bad-event", "drop"], ["--event-stream", "left"]):
        refused = run(denoiser_onnx, "--input", "clip.mp4", *option)
        assert refused.exit_code == 2
        assert f"{' '.join(option)}: is for events, and the model takes pictures" in refused.stderr


def test_a_model_of_events_is_verified_over_a_recording(firenet_onnx: Path, recording: Path) -> None:
    wanted = ["verify", str(firenet_onnx), "--input", str(recording), "--steps", "4", "--warm-up", "16"]
    result = CliRunner().invoke(main, wanted)
    assert result.exit_code == 0, result.output
    assert "verified " in result.output


def test_verify_is_told_what_a_recording_does_not_say(firenet_onnx: Path, recording: Path) -> None:
    npz = recording.with_suffix(".npz")

    def verify(*options: object) -> Result:
        wanted = ["verify", firenet_onnx, "--steps", "2", "--warm-up", "4", *options]
        return CliRunner().invoke(main, list(map(str, wanted)))

    unknown = verify("--input", npz)
    assert unknown.exit_code == 2
    assert "--size" in unknown.stderr
    told = verify("--input", npz, "--size", "48x32")
    assert told.exit_code == 0, told.output
    assert verify("--input", recording, "--event-stream", "left").exit_code == 2
    assert verify("--size", "48x32").exit_code == 2
