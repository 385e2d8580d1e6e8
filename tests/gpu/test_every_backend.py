"""Behaviour that every back end must have: tested on the CPU in each run, and on a GPU by `make gpu-check`.

What needs a GPU is skipped where there is none, and says so. The CPU rows run the very same code,
so a mistake in a test shows without a GPU.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from stepcell import StepLoop
from stepcell.errors import InputError
from stepcell.exporter import export_onnx
from stepcell.models import CellStack, ConvGRUCell
from stepcell.models.zoo.clips import read_clip
from stepcell.runtime import cuda
from stepcell.runtime.streams.report import StreamReport
from stepcell.runtime.streams.run import run_streams
from tests.gpu.places import SLOTS, TOLERANCE, Place, frames, worst

STEPS = 1000


@pytest.fixture(params=list(TOLERANCE))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """One back end."""
    if request.param == "cpu-ncnn":
        if importlib.util.find_spec("ncnn") is None:
            pytest.skip("the package ncnn is not installed")
    elif request.param != "cpu":
        found = cuda.discover()
        if not found.devices:
            pytest.skip(f"needs a GPU: {found.problem}")
        print(f"\n{found.devices[0].name}, driver for CUDA {found.driver}, {platform.platform()}")
    if request.param == "cuda-onnx" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu: this onnxruntime has no CUDA provider")
    return Place(request.param, tmp_path)


@pytest.fixture
def loop(place: Place, denoiser_onnx: Path) -> Iterator[StepLoop]:
    with place.open(denoiser_onnx) as opened:
        yield opened


@pytest.fixture
def tolerance(place: Place) -> float:
    return TOLERANCE[place.kind]


@pytest.fixture
def reference(denoiser_onnx: Path) -> Iterator[StepLoop]:
    with StepLoop.open(denoiser_onnx) as opened:
        yield opened


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
    print(f"worst difference over {STEPS} steps: {error:.2e}; {loop.latency.summary()}")
    assert error <= tolerance


def test_steps_begun_ahead_equal_steps_one_by_one(place: Place, loop: StepLoop, denoiser_onnx: Path) -> None:
    xs = frames(200)
    with place.open(denoiser_onnx) as other:
        pending = [(loop.step_async(x=x), other.step(x=x)["y"]) for x in xs]
        for number, (each, y) in enumerate(pending):
            np.testing.assert_array_equal(each.result()["y"], y, err_msg=f"step {number}")
        np.testing.assert_array_equal(loop.state()["h"], other.state()["h"])


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


def test_slots_equal_loops_of_their_own(place: Place, denoiser_onnx: Path, tolerance: float) -> None:
    """Streams at rates of 1, 2 and 3. Another batch size may use other tiles, hence the tolerance."""
    clips = [frames(100, seed=seed)[:, :1] for seed in range(SLOTS)]
    alone = [place.open(denoiser_onnx) for _ in clips]
    error = 0.0
    with place.open(denoiser_onnx, slots=SLOTS) as loop:
        slots = [loop.attach() for _ in clips]
        for number in range(100):
            if number == 50:
                loop.detach(slots[1])
                slots[1] = loop.attach("late")
                alone[1].reset()
            due = [stream for stream in range(SLOTS) if number % (stream + 1) == 0]
            outputs = loop.step_slots({slots[stream]: {"x": clips[stream][number]} for stream in due})
            for stream in due:
                error = max(error, worst(outputs[slots[stream]]["y"], alone[stream].step(x=clips[stream][number])["y"]))
    for each in alone:
        each.close()
    print(f"worst difference between slots and loops of their own: {error:.2e}")
    assert error <= tolerance


def test_idle_slots_and_neighbours_of_nan_are_untouched(place: Place, denoiser_onnx: Path) -> None:
    xs = frames(20)[:, :1]
    with place.open(denoiser_onnx, slots=SLOTS) as loop:
        well, sick, idle = (loop.attach(name) for name in ("well", "sick", "idle"))
        loop.step_slots({slot: {"x": xs[0]} for slot in (well, sick, idle)})
        state = loop.state()
        state["h"][sick.index] = np.nan
        loop.load_state(state)
        kept = state["h"][idle.index].tobytes()
        for x in xs[1:]:
            outputs = loop.step_slots({well: {"x": x}, sick: {"x": x}})
            assert np.isfinite(outputs[well]["y"]).all()
            assert np.isnan(outputs[sick]["y"]).any()
        after = loop.state()["h"]
        assert after[idle.index].tobytes() == kept
        loop.reset([sick])
        cleared = loop.state()["h"]
        assert not cleared[sick.index].any()
        for slot in (well, idle):
            assert cleared[slot.index].tobytes() == after[slot.index].tobytes()


def test_snapshot_goes_to_the_cpu_and_back(place: Place, denoiser_onnx: Path, tolerance: float, tmp_path: Path) -> None:
    path, xs = tmp_path / "state.safetensors", frames(12)[:, :1]
    with place.open(denoiser_onnx, slots=2) as loop, StepLoop.open(denoiser_onnx, slots=2) as cpu:
        slot = loop.attach("front")
        for x in xs[:6]:
            loop.step_slots({slot: {"x": x}})
        loop.save(path, frame=6)
        expected = [loop.step_slots({slot: {"x": x}})[slot]["y"] for x in xs[6:]]
        assert cpu.restore(path).frame == 6
        front = cpu.slots["front"]
        found = [cpu.step_slots({front: {"x": x}})[front]["y"] for x in xs[6:]]
        error = max(map(worst, found, expected))
        cpu.restore(path)
        cpu.step_slots({front: {"x": xs[6]}})
        cpu.save(path, frame=7)
        loop.restore(path)
        again = [loop.step_slots({slot: {"x": x}})[slot]["y"] for x in xs[7:]]
        error = max([error, *map(worst, again, expected[1:])])
    print(f"worst difference after a snapshot changed places: {error:.2e}")
    assert error <= tolerance


def test_learned_initial_states(place: Place, exported: Path, tolerance: float) -> None:
    path = exported / "initial.onnx"
    if not path.exists():
        torch.manual_seed(0)
        stack = CellStack([ConvGRUCell(3, 8)])
        stack.initial = {"h": torch.linspace(-1, 1, 8).reshape(8, 1, 1)}
        export_onnx(stack, path)
    xs = frames(3)
    with place.open(path) as loop, StepLoop.open(path) as cpu:
        for mask in ([True, True], [True, False]):
            error = max(worst(loop.step(x=x)["y"], cpu.step(x=x)["y"]) for x in xs)
            assert error <= tolerance
            loop.reset(mask)
            state = loop.state()["h"]
            np.testing.assert_allclose(state[0].mean((1, 2)), np.linspace(-1, 1, 8), atol=1e-3)
            cpu.load_state({"h": state})


def test_policies_over_a_stream(place: Place, denoiser_onnx: Path, tmp_path: Path, tolerance: float) -> None:
    """A run with resets at a scene cut and every N frames, and a snapshot half-way, against the same run on the CPU."""
    clip = read_clip("bikes")[60:90, ::4, ::6][:, :64, :96].copy()
    np.save(tmp_path / "clip.npy", clip)

    def run(opened: StepLoop, name: str, **options: Any) -> StreamReport:
        options |= {"reset_every": 20, "reset_on_cut": True, "on_nonfinite": "reset"}
        return run_streams(opened, tmp_path / "clip.npy", tmp_path / name, **options).streams[0]

    path = tmp_path / "state.safetensors"
    with place.open(denoiser_onnx) as loop, StepLoop.open(denoiser_onnx) as cpu:
        report = run(loop, "found.npy")
        assert report.resets == {"every": 1, "gap": 0, "cut": 1, "size": 0, "demand": 0, "non-finite": 0}
        run(cpu, "expected.npy")
        found, expected = (np.load(tmp_path / f"{name}.npy") for name in ("found", "expected"))
        assert worst(found, expected) <= tolerance
        run(loop, "first.npy", limit=11, snapshot=path)
        rest = run(loop, "rest.npy", snapshot=path, resume=True)
    assert rest.first_frame == 11
    np.testing.assert_array_equal(np.load(tmp_path / "rest.npy"), found[11:])
