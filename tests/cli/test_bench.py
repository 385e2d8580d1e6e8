"""`stepcell bench`: figures of every kind, ratios of several files, the floor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from stepcell.cli import main
from stepcell.onnx_model import read_onnx
from stepcell.runtime.benchmark.floor import Machine as Processor
from stepcell.runtime.benchmark.floor import floor, work_of
from stepcell.runtime.engine.sidecar import read_sidecar
from tests.fakes.fake_engine import Machine

FAST = ("--shape", "x:1x3x16x16", "--duration", "0.1", "--warmUp", "10", "--iterations", "10", "--threads", "1")


def bench(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_figures_of_two_files_and_several_streams(
    denoiser_onnx: Path, denoiser_onnx_float32: Path, tmp_path: Path
) -> None:
    plot, times = tmp_path / "t.svg", tmp_path / "t.json"
    result = bench(
        denoiser_onnx, denoiser_onnx_float32, "--streams", "1,2", "--percentile", "50,99", "--plot", plot,
        "--exportTimes", times, "--json", *FAST,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    first, second = report["models"]
    assert [each["streams"] for each in first["times"]] == [1, 2]
    assert first["shapes"] == {"x": [1, 3, 16, 16]}
    assert first["times"][0]["ratio"] is None
    for model in (first, second):
        for each in model["times"]:
            assert each["count"] >= 10
            assert 0 < each["percentiles_ms"]["50"] <= each["percentiles_ms"]["99"] <= each["max_ms"]
            assert each["floor"]["compute_ms"] > 0
            assert each["times_ms"] == []
    low, high = second["times"][1]["ratio"]["quartiles"]
    assert 0 < low <= second["times"][1]["ratio"]["median"] <= high
    kept = json.loads(times.read_text())["models"][0]["times"][0]
    assert len(kept["times_ms"]) == kept["count"]
    assert plot.read_text().startswith("<svg")
    assert "times as fast" in result.stderr
    assert "GFLOP/s" in result.stderr


def test_the_work_of_the_denoiser_is_what_its_layers_say(denoiser_onnx_float32: Path) -> None:
    contract = read_onnx(denoiser_onnx_float32).contract
    work = work_of(denoiser_onnx_float32, contract, {"batch": 2, "height": 32, "width": 48})
    low = 16 * 24  # pixels at half resolution
    hidden = 8
    per_row = (
        low * hidden * 3 * 25  # down
        + low * hidden * hidden * 9  # encoder
        + low * 3 * hidden * (2 * hidden) * 9  # cell: three gates of x and h
        + low * hidden * 2 * hidden * 9  # decoder
        + low * hidden * 3 * 4  # up
    )
    assert work.operations == 2 * 2 * per_row
    states_and_frames = 4 * (2 * 2 * 3 * 32 * 48 + 2 * 2 * hidden * low)
    assert states_and_frames < work.bytes < states_and_frames + 4 * 12000
    found = floor(work, Processor(bytes_per_second=1e9, operations_per_second=1e9, threads=1))
    assert found.milliseconds == found.compute_ms > found.memory_ms
    np.testing.assert_allclose(found.compute_ms, work.operations / 1e6)


@pytest.mark.parametrize(
    "arguments",
    [["--streams", "0"], ["--streams", "two"], ["--percentile", "101"], ["--plot", "a.png"], ["--shape", "z:1x3x8x8"]],
)
def test_what_does_not_fit(denoiser_onnx: Path, arguments: list[str]) -> None:
    assert bench(denoiser_onnx, *arguments).exit_code in (1, 2)


def test_a_fixed_batch_has_one_number_of_streams(denoiser_onnx_fixed: Path) -> None:
    result = bench(denoiser_onnx_fixed, "--streams", "1,2", "--no-floor", "--duration", "0.05", "--iterations", "4")
    assert result.exit_code == 1
    assert "its batch is fixed" in result.stderr


def test_an_engine_is_timed_at_the_sizes_it_was_tuned_for(
    denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(denoiser_onnx, tmp_path, monkeypatch)
    result = bench(
        machine.path, "--streams", "1,3", "--duration", "0.05", "--iterations", "4", "--warmUp", "1", "--json"
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    (model,) = report["models"]
    assert model["runs"].endswith(", Fake GPU")
    assert model["shapes"]["x"][2:] == list(read_sidecar(machine.path).profiles["x"].opt[2:])
    assert [times["streams"] for times in model["times"]] == [1, 3]
    for times in model["times"]:
        assert set(times["parts"]) == {"copy_in_ms", "compute_ms", "copy_out_ms"}
        assert times["parts"]["compute_ms"] > 0
    assert "copy out" in result.stderr
    assert not machine.gpu.allocations, "memory that was never freed"
    assert report["machine"] is None  # the floor is that of the processor
