"""What `run` copies to a GPU, counted where every copy passes: at the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell import Nv12
from stepcell.exporter import fuse
from stepcell.runtime.streams.run import run_streams
from tests.fakes.fake_engine import Machine

FRAMES, HEIGHT, WIDTH = 5, 16, 24
SHAPES = {"float": (HEIGHT, WIDTH, 3), "uint8": (HEIGHT, WIDTH, 3), "nv12": (HEIGHT * 3 // 2, WIDTH)}
BYTES = {"float": HEIGHT * WIDTH * 3 * 4, "uint8": HEIGHT * WIDTH * 3, "nv12": HEIGHT * WIDTH * 3 // 2}


@pytest.mark.parametrize("form", ["float", "uint8", "nv12"])
def test_a_step_uploads_its_frame_once_and_no_state(
    form: Any, denoiser_onnx_float32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = denoiser_onnx_float32
    if form != "float":
        model = tmp_path / "bytes.onnx"
        how = Nv12(matrix="bt709", range="limited") if form == "nv12" else form
        fuse(denoiser_onnx_float32, model, pixel_dtype=how)
    machine = Machine(model, tmp_path, monkeypatch)
    clip = np.random.default_rng(0).integers(0, 256, (FRAMES, *SHAPES[form]), np.uint8)
    np.save(tmp_path / "clip.npy", clip)

    # frame 3 starts from zeros again, which are written on the device
    report = run_streams(machine.path, tmp_path / "clip.npy", tmp_path / "gpu.npy", device="cuda", reset_every=3)
    assert report.streams[0].resets["every"] == 1
    assert machine.counted.calls["cuMemcpyHtoDAsync"] == FRAMES
    assert machine.counted.bytes["up"] == FRAMES * BYTES[form]
    run_streams(model, tmp_path / "clip.npy", tmp_path / "cpu.npy", reset_every=3, backend="onnxruntime")
    np.testing.assert_array_equal(np.load(tmp_path / "gpu.npy"), np.load(tmp_path / "cpu.npy"))
