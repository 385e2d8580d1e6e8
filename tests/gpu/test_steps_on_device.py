"""Steps of an engine on a GPU: CUDA graphs, overlapping copies, and arrays that stay on the device.

The figures go to benchmarks/results/loop-<device>.json, with all that is needed to read them.
"""

from __future__ import annotations

import contextlib
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.errors import DeviceError, MissingDependencyError
from stepcell.files import write_atomic
from stepcell.runtime import cuda
from stepcell.runtime.backends.tensorrt.backend import TensorRTBackend
from stepcell.runtime.backends.tensorrt.runtime_cache import cache_path
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions
from tests.fakes.counting_driver import ALLOCATING, CREATING, WAITING, CountingDriver
from tests.gpu.places import SHAPE, Place, frames

LARGE = (1, 3, 1080, 1920)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def gpu() -> cuda.Gpu:
    found = cuda.discover()
    if not found.devices:
        pytest.skip(f"not run: needs a GPU: {found.problem}")
    return found.devices[0]


@pytest.fixture(scope="module")
def figures(gpu: cuda.Gpu) -> Iterator[dict[str, Any]]:
    """Figures that are written to a file at the end, with the device."""
    taken: dict[str, Any] = {}
    yield taken
    if taken:
        document = {
            "device": gpu.name,
            "compute_capability": gpu.compute_capability,
            "driver": cuda.discover().driver,
            "platform": platform.platform(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            **taken,
        }
        RESULTS.mkdir(exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
        data = msgspec.json.format(msgspec.json.encode(document), indent=1)
        write_atomic(RESULTS / f"loop-{slug}.json", data + b"\n")


@pytest.fixture
def place(gpu: cuda.Gpu, tmp_path: Path) -> Place:
    return Place("cuda-engine", tmp_path)


@pytest.fixture
def loop(place: Place, denoiser_onnx: Path) -> Iterator[StepLoop]:
    with place.open(denoiser_onnx) as opened:
        yield opened


def engine_of(loop: StepLoop) -> TensorRTBackend:
    assert isinstance(loop._backend, TensorRTBackend)
    return loop._backend


def test_graph_replay_equals_kernels_queued_one_by_one(
    place: Place, denoiser_onnx: Path, monkeypatch: pytest.MonkeyPatch, figures: dict[str, Any]
) -> None:
    def refuse(*_: Any) -> Any:
        raise DeviceError("refused by this test")

    xs = frames(200)
    with place.open(denoiser_onnx) as captured, place.open(denoiser_onnx) as plain:
        captured.step(x=xs[0])
        if engine_of(captured)._step_buffers[0].graph is None:
            pytest.skip("not run: this engine cannot be captured")
        with monkeypatch.context() as patch:
            patch.setattr(cuda.Graph, "capture", refuse)
            plain.step(x=xs[0])
        assert engine_of(plain)._step_buffers[0].graph is None
        for number, x in enumerate(xs[1:], 1):
            if number == 100:
                captured.reset([True, False])
                plain.reset([True, False])
            np.testing.assert_array_equal(captured.step(x=x)["y"], plain.step(x=x)["y"], err_msg=f"step {number}")
        np.testing.assert_array_equal(captured.state()["h"], plain.state()["h"])
        figures["graph"] = {
            "shape": SHAPE,
            "tensorrt": captured.description,
            "step_with_graph": msgspec.to_builtins(captured.latency.summary()),
            "step_without_graph": msgspec.to_builtins(plain.latency.summary()),
        }


def test_a_step_copies_a_frame_in_and_an_output_out(
    loop: StepLoop, monkeypatch: pytest.MonkeyPatch, figures: dict[str, Any]
) -> None:
    xs = frames(50).astype(loop.contract.inputs[0].dtype)
    loop.step(x=xs[0])
    counted = CountingDriver(cuda.driver())
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", counted)
    for x in xs:
        y = loop.step(x=x)["y"]
    up, down, within = (counted.bytes[kind] for kind in ("up", "down", "within"))
    figures["bytes_per_step"] = {"up": up // len(xs), "down": down // len(xs), "within": within // len(xs)}
    assert (up, down, within) == (len(xs) * xs[0].nbytes, len(xs) * y.nbytes, 0)
    assert not counted.calls.keys() & {*ALLOCATING, *CREATING, *WAITING}


@pytest.mark.slow
def test_copies_overlap_with_compute(
    place: Place, denoiser_onnx: Path, tmp_path: Path, figures: dict[str, Any]
) -> None:
    """Overlapping steps take less time than upload, compute and download one after the other."""
    path, count = tmp_path / "large.engine", 200
    build_engine(denoiser_onnx, path, BuildOptions(min_shapes={"x": LARGE}, max_shapes={"x": LARGE}))
    with StepLoop.open(path, device="cuda", check_finite=False) as loop:
        x = np.random.default_rng(0).random(LARGE).astype(loop.contract.inputs[0].dtype)
        stages = []
        for _ in range(50):
            loop.step(x=x)
            stages.append(engine_of(loop).step_milliseconds())
        one_by_one = _milliseconds(count, lambda: loop.step(x=x))
        held = [loop.step_async(x=x)]

        def ahead() -> None:
            held.append(loop.step_async(x=x))
            held.pop(0).result()

        overlapped = _milliseconds(count, ahead)
        held.pop().result()
        description = loop.description
    middle = {name: float(np.median([stage[name] for stage in stages])) for name in stages[0]}
    figures["overlap"] = {
        "shape": LARGE,
        "tensorrt": description,
        "stages_ms": middle,
        "step_ms": one_by_one,
        "step_async_ms": overlapped,
    }
    print(figures["overlap"])
    # The host's own copies into and out of page-locked memory are in both.
    host = one_by_one - sum(middle.values())
    assert overlapped < one_by_one - 0.5 * min(middle["compute"], middle["copy_in"] + middle["copy_out"] + host)


def _milliseconds(count: int, call: Any) -> float:
    for _ in range(10):
        call()
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count * 1e3


def test_arrays_of_torch_go_in_and_out_on_the_device(loop: StepLoop, place: Place, denoiser_onnx: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("not run: this torch has no CUDA")
    dtype = getattr(torch, loop.contract.inputs[0].dtype)
    xs = torch.from_numpy(frames(100)).to("cuda", dtype)
    with place.open(denoiser_onnx) as other:
        for number, x in enumerate(xs):
            expected = other.step(x=x.cpu().numpy())["y"]
            if number % 2:
                found: NDArray[Any] = torch.from_dlpack(loop.step_on_device(x=x * 1)["y"]).cpu().numpy()  # type: ignore[attr-defined]
            else:
                found = loop.step(x=x * 1)["y"]
            np.testing.assert_array_equal(found, expected, err_msg=f"step {number}")


def test_latency_of_a_thousand_steps(place: Place, denoiser_onnx: Path, figures: dict[str, Any]) -> None:
    (x,) = frames(1)
    taken = figures["latency"] = {"shape": SHAPE, "steps": 1000}
    for kind in ("cuda-engine", "cuda-onnx"):
        with (
            contextlib.suppress(DeviceError, MissingDependencyError),
            Place(kind, place.folder).open(denoiser_onnx) as loop,
        ):
            for _ in range(1000):
                loop.step(x=x)
            taken[kind] = {"runs": loop.description, **msgspec.to_builtins(loop.latency.summary())}
    assert "cuda-engine" in taken


def test_second_start_of_an_rtx_engine(place: Place, denoiser_onnx: Path, figures: dict[str, Any]) -> None:
    seconds = []
    for _ in range(2):
        with place.open(denoiser_onnx) as loop:
            if "RTX" not in loop.description:
                pytest.skip(f"not run: {loop.description} has no runtime cache")
            started = time.perf_counter()
            loop.step(x=frames(1)[0])
            seconds.append(time.perf_counter() - started)
    assert cache_path(place.folder / f"{denoiser_onnx.stem}.engine").stat().st_size
    figures["first_step_seconds"] = {"without_cache": seconds[0], "with_cache": seconds[1]}
    assert seconds[1] < seconds[0]
