"""The same promises on every back end: on the CPU in each run, on a GPU by `make gpu-check`.

What needs a GPU is skipped where there is none, and says so. The CPU rows run the very same code,
so a mistake in a test shows without a GPU.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime import StepLoop, cuda
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions

SHAPE = (2, 3, 64, 96)
STEPS = 1000
# float16 compute against the float32 form of the same weights, over all steps (outputs and states
# of the small denoiser lie in about -1 to 2).
TOLERANCE = {"cpu": 0.0, "cuda-onnx": 2e-2, "cuda-engine": 2e-2}


@pytest.fixture(params=list(TOLERANCE))
def loop(request: pytest.FixtureRequest, denoiser_onnx: Path, tmp_path: Path) -> Iterator[StepLoop]:
    """One back end; the kind is in `request.param`."""
    path, device = denoiser_onnx, "cpu"
    if request.param != "cpu":
        found = cuda.discover()
        if not found.devices:
            pytest.skip(f"needs a GPU: {found.problem}")
        device = "cuda"
        print(f"\n{found.devices[0].name}, driver for CUDA {found.driver}, {platform.platform()}")
    if request.param == "cuda-onnx" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu: this onnxruntime has no CUDA provider")
    if request.param == "cuda-engine":
        path = tmp_path / "model.engine"
        build_engine(denoiser_onnx, path, BuildOptions(opt_shapes={"x": SHAPE}))
    with StepLoop.open(path, device=device) as opened:
        print(opened.description)
        yield opened


@pytest.fixture
def tolerance(request: pytest.FixtureRequest) -> float:
    return TOLERANCE[request.node.callspec.params["loop"]]


@pytest.fixture
def reference(denoiser_onnx: Path) -> Iterator[StepLoop]:
    with StepLoop.open(denoiser_onnx) as opened:
        yield opened


def frames(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


def worst(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


@pytest.mark.slow
def test_equal_over_a_thousand_steps_with_resets(loop: StepLoop, reference: StepLoop, tolerance: float) -> None:
    error = 0.0
    for number in range(STEPS):
        (x,) = frames(1, seed=number)
        if number in (300, 700):
            for each in (loop, reference):
                each.reset([number == 300, number == 700])
        error = max(error, worst(loop.step(x=x)["y"], reference.step(x=x)["y"]))
    error = max(error, worst(loop.state()["h"], reference.state()["h"]))
    print(f"worst difference over {STEPS} steps: {error:.2e}; {loop.statistics.summary()}")
    assert error <= tolerance


def test_reset_of_one_slot_clears_nan_and_leaves_the_other_bit_by_bit(loop: StepLoop) -> None:
    first, second = frames(2)
    loop.step(x=first)
    state = loop.state()
    kept = state["h"][0].copy()
    state["h"][1] = np.nan
    loop.load_state(state)
    loop.reset([False, True])
    after = loop.state()["h"]
    np.testing.assert_array_equal(after[0], kept)
    assert not after[1].any()
    assert np.isfinite(loop.step(x=second)["y"]).all()


def test_snapshot_continues_bit_by_bit(loop: StepLoop) -> None:
    xs = frames(12)
    for x in xs[:6]:
        loop.step(x=x)
    snapshot = loop.state()
    expected = [loop.step(x=x)["y"] for x in xs[6:]]
    loop.load_state(snapshot)
    for x, y in zip(xs[6:], expected, strict=True):
        np.testing.assert_array_equal(loop.step(x=x)["y"], y)


def test_outputs_belong_to_the_caller(loop: StepLoop) -> None:
    first, second = frames(2)
    y = loop.step(x=first)["y"]
    kept = y.copy()
    loop.step(x=second)
    np.testing.assert_array_equal(y, kept)


def test_a_refused_step_changes_nothing(loop: StepLoop) -> None:
    first, second = frames(2)
    loop.step(x=first)
    before = loop.state()["h"]
    second[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        loop.step(x=second)
    np.testing.assert_array_equal(loop.state()["h"], before)
