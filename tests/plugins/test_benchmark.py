"""What of benchmarks/kernels.py needs no GPU: its shapes, the peers' arithmetic, the picture, its refusal."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True  # the pointwise kernels of a peer
        yield importlib.import_module("kernels")
    for name in ("kernels", "kernel_peers", "kernel_plot", "kernel_pointwise"):
        sys.modules.pop(name, None)


def test_every_peer_computes_the_step(benchmark: Any) -> None:
    shape = benchmark.Shape("tiny", 2, 16, 24, 5, 7, (3, 1))
    weights = benchmark.random_weights(shape, "cpu", torch.float16)
    torch.manual_seed(0)
    x, h = (
        torch.randn(2, c, 5, 7).half().contiguous(memory_format=torch.channels_last)
        for c in (shape.inputs, shape.hidden)
    )
    exact = benchmark.reference(weights, x, h)
    checked = []
    for name, (build, whole) in benchmark.PEERS.items():
        if whole and "compile" not in name:
            error = float((build(weights)(x, h).double() - exact).abs().max())
            assert error < benchmark.TOLERANCE, (name, error)
            checked.append(name)
    assert len(checked) == 3
    assert float((h.double() - exact).abs().max()) > 0.1  # the step does something


def test_work_and_bytes_of_the_shapes(benchmark: Any) -> None:
    shapes = {shape.name[:2]: shape for shape in benchmark.SHAPES}
    assert [f"{shapes[s].flops / 1e9:.3g}" for s in ("S1", "S2", "S4", "S5", "S6")] == [
        "1.36",
        "7.25",
        "29",
        "14.3",
        "2.12",
    ]
    assert [f"{shapes[s].nbytes / 1e6:.3g}" for s in ("S1", "S2", "S4", "S5", "S6")] == [
        "1.64",
        "6.73",
        "25.6",
        "49.8",
        "7.54",
    ]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, FOLDER / "kernels.py", "--output", tmp_path / "new" / "result.json"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "not run: no CUDA device" in found.stderr
    assert json.loads((tmp_path / "new" / "result.json").read_text())["not_run"] == "no CUDA device"


def test_the_picture_shows_ratios_to_the_floor(benchmark: Any) -> None:
    times = {"isolated": {"median": 30.0}}
    contenders = {"stepcell": {"microseconds": times, "step": True}, "a < b": {"not_run": "absent"}}
    shape = {"name": "S1", "floor_microseconds": {"compute": 10.0, "memory": 5.0}, "contenders": contenders}
    picture = benchmark.svg({"device": "GPU", "shapes": [shape]})
    texts = [element.text for element in ET.fromstring(picture).iter() if element.text and element.text.strip()]
    assert "S1 (floor 10.0 us)" in texts
    assert "3.0x, 30.0 us" in texts
    assert texts[-2:] == ["a < b", "not run"]
