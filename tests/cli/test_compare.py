"""`stepcell compare`: arrays, clips and folders frame by frame."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from stepcell import open_sink
from stepcell.cli import main


def compare(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["compare", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def arrays(tmp_path: Path) -> tuple[Path, Path]:
    """10 frames each; the error doubles from frame to frame, from 1e-3 in frame 1 to 0.512 in frame 10."""
    a, b = tmp_path / "a.npy", tmp_path / "b.npy"
    truth = np.random.default_rng(0).uniform(-1, 1, (10, 3, 4, 5)).astype("f4")
    np.save(b, truth)
    np.save(a, truth + np.reshape(1e-3 * 2.0 ** np.arange(10), (10, 1, 1, 1)).astype("f4"))
    return a, b


def test_the_table_and_the_plot(arrays: tuple[Path, Path], tmp_path: Path) -> None:
    plot = tmp_path / "growth.svg"
    result = compare(*arrays, "--plot", plot, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["growth"]["steps"] == [1, 2, 4, 8, 10]
    np.testing.assert_allclose(found["growth"]["rms"], [0.001, 0.002, 0.008, 0.128, 0.512], rtol=1e-3)
    assert (found["frames"], found["worst_frame"]) == (10, 10)
    assert "largest difference 0.512 in frame 10" in result.stderr
    assert plot.read_text().startswith("<svg")


def test_a_tolerance_names_the_first_frame_beyond_it(arrays: tuple[Path, Path]) -> None:
    assert compare(*arrays, "--tolerance", "0.6").exit_code == 0
    result = compare(*arrays, "--tolerance", "0.02")
    assert result.exit_code == 3
    assert "beyond 0.02 from frame 6 on" in result.stderr


def test_nan_on_one_side_is_beyond_every_tolerance(arrays: tuple[Path, Path]) -> None:
    a, b = arrays
    spoiled = np.load(b)
    spoiled[3, 0, 0, 0] = np.nan
    np.save(a, spoiled)
    result = compare(a, b, "--tolerance", "1e9")
    assert result.exit_code == 3
    assert "from frame 4 on" in result.stderr


def test_values_that_are_not_finite_in_both_are_told(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).random((3, 2, 4, 4), np.float32)
    frames[1, 0, 0, :2] = np.nan, np.inf
    np.save(tmp_path / "a.npy", frames)
    result = compare(tmp_path / "a.npy", tmp_path / "a.npy")
    assert result.exit_code == 0, result.stderr
    assert "2 values are NaN or Inf in both" in result.stderr
    assert "largest difference 0 in frame 1 of values up to 0.9" in result.stderr
    assert "cosine 1.000000" in result.stderr


def test_folders_of_pictures_and_a_shorter_one(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), np.uint8)
    for name, count in (("a", 4), ("b", 3)):
        sink = open_sink(str(tmp_path / name), fps=Fraction(25))
        for frame in frames[:count]:
            sink.write(frame if name == "a" else np.maximum(frame, 1))
        sink.close()
    result = compare(tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 0, result.stderr
    assert "compared 3 frames: largest difference 1 " in result.stderr
    assert "PSNR" in result.stderr
    assert "4 frames" in result.stderr


def test_what_cannot_be_compared(arrays: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.npy"
    np.save(other, np.zeros((10, 3, 4, 4)))
    assert "has shape" in compare(arrays[0], other).stderr
    other.write_bytes(b"nothing")
    assert compare(arrays[0], other).exit_code == 1
    assert compare(*arrays, "--plot", "a.gif").exit_code == 2
