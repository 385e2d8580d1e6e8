"""TensorRT back end on a fake GPU: buffers, resets, idle rows and errors of its steps.

Everything but the GPU is real: the engine file, its sidecar and the back end. Each test runs with the step captured
as CUDA graphs, with its kernels queued one by one, and with an engine that takes the fp16 mirror of its state; that one
computes NaN wherever the mirror differs from the state.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import tensorrt_rtx

from stepcell import StepLoop
from stepcell.errors import DeviceError, EngineMismatchError, InputError, StateError
from stepcell.plugins.fp16_mirrors import Fp16Mirror, engine_tensors
from stepcell.runtime.backends.tensorrt.backend import TensorRTBackend
from tests.fakes.counting_driver import ALLOCATING, CREATING, WAITING
from tests.fakes.fake_engine import SYMBOLS, Machine, frames, reference


def test_many_steps_equal_plain_onnx_runtime(machine: Machine, backend: TensorRTBackend) -> None:
    backend.configure(SYMBOLS)
    clip = frames(25)
    expected = reference(machine.onnx, machine.contract, clip)
    results = [backend.step({"x": frame}) for frame in clip]
    for result, outputs in zip(results, expected, strict=True):  # compared at the end: results are the caller's
        np.testing.assert_array_equal(result["y"], outputs["y"])
    np.testing.assert_array_equal(backend.read_state()["h"], expected[-1]["state_out.h"])


@pytest.mark.parametrize("fp16_mirrors", [False, True])
def test_several_states_of_different_kinds(
    stack_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fp16_mirrors: bool
) -> None:
    machine = Machine(stack_onnx, tmp_path, monkeypatch, fp16_mirrors=fp16_mirrors)
    backend = machine.open()
    machine.engine.get_tensor_shape = machine.shape_of  # type: ignore[method-assign]
    backend.configure(SYMBOLS)
    clip = frames(9)
    expected = reference(stack_onnx, machine.contract, clip)
    for frame, outputs in zip(clip, expected, strict=True):
        np.testing.assert_array_equal(backend.step({"x": frame})["y"], outputs["y"])
        for name, value in backend.read_state().items():
            np.testing.assert_array_equal(value, outputs[f"state_out.{name}"])
    backend.close()


def test_state_buffers_change_places_and_nothing_is_allocated(machine: Machine, backend: TensorRTBackend) -> None:
    backend.configure(SYMBOLS)
    machine.engine.runs.clear()
    machine.counted.clear()
    for frame in frames(4):
        backend.step({"x": frame})
    assert not machine.counted.calls.keys() & {*ALLOCATING, *CREATING, *WAITING}
    runs = machine.engine.runs
    for earlier, later in itertools.pairwise(runs):
        assert later["state_in.h"] == earlier["state_out.h"]
        assert later["state_out.h"] == earlier["state_in.h"]
        for mirror in machine.engine.mirrors:
            assert later[mirror.input] == earlier[mirror.output]
            assert later[mirror.output] == earlier[mirror.input]
        assert later["x"] != earlier["x"]
    assert runs[0]["x"] == runs[2]["x"]


def test_reset_of_all_is_a_fresh_start(machine: Machine, backend: TensorRTBackend) -> None:
    backend.configure(SYMBOLS)
    clip = frames(3)
    first = [backend.step({"x": frame})["y"] for frame in clip]
    backend.reset()
    again = [backend.step({"x": frame})["y"] for frame in clip]
    np.testing.assert_array_equal(first, again)


def test_reset_selects_slots_and_keeps_the_others(machine: Machine, backend: TensorRTBackend) -> None:
    backend.configure(SYMBOLS)
    for frame in frames(3):
        backend.step({"x": frame})
    poisoned = backend.read_state()
    poisoned["h"][1] = np.nan
    backend.write_state(poisoned)
    backend.reset([False, True])
    state = backend.read_state()["h"]
    np.testing.assert_array_equal(state[0], poisoned["h"][0])
    np.testing.assert_array_equal(state[1], 0)
    with pytest.raises(StateError, match="expected 2 rows, got 3"):
        backend.reset([True] * 3)


def test_idle_rows_keep_their_states_and_only_they_are_copied(machine: Machine, backend: TensorRTBackend) -> None:
    backend.configure({**SYMBOLS, "batch": 3})
    clip = frames(12, 3)
    for frame in clip[:2]:
        backend.step({"x": frame})
    before = backend.read_state()["h"]
    assert not machine.counted.calls["cuMemcpyDtoDAsync"]
    machine.counted.clear()
    busy = reference(machine.onnx, machine.contract, clip)
    for frame, outputs in zip(clip[2:], busy[2:], strict=True):
        y = backend.step({"x": frame}, idle=[0, 2])["y"]
        np.testing.assert_array_equal(y[1], outputs["y"][1])
        state = backend.read_state()["h"]
        assert state[0].tobytes() == before[0].tobytes()
        assert state[2].tobytes() == before[2].tobytes()
        np.testing.assert_array_equal(state[1], outputs["state_out.h"][1])
    assert machine.counted.calls["cuMemcpyDtoDAsync"] == 2 * (1 + len(machine.engine.mirrors)) * len(clip[2:])
    assert not machine.counted.calls.keys() & {*ALLOCATING, *CREATING}


def test_failed_step_with_idle_rows_keeps_the_state(machine: Machine, backend: TensorRTBackend) -> None:
    backend.configure(SYMBOLS)
    first, second = frames(2)
    backend.step({"x": first})
    before = backend.read_state()["h"]
    machine.refuse(yes=True)
    with pytest.raises(DeviceError):
        backend.step({"x": second}, idle=[1])
    np.testing.assert_array_equal(backend.read_state()["h"], before)


def test_loop_with_slots_equals_the_same_loop_on_the_cpu(machine: Machine, tmp_path: Path) -> None:
    """The loop's logic on this back end: slots at different rates, resets, and a snapshot there and back."""
    path = tmp_path / "state.safetensors"
    cpu = StepLoop.open(machine.onnx, slots=3, keep_float16=True)
    gpu = StepLoop(machine.open(), name="engine", slots=3)
    clip = frames(40, 1)
    names = ["a", "b", "c"]
    for number, frame in enumerate(clip):
        for loop in (cpu, gpu):
            if number == 0:
                for name in names[:2]:
                    loop.attach(name)
            if number == 10:
                loop.detach(loop.slots["a"])
                loop.attach("c")
            if number == 20:
                loop.reset([loop.slots["b"]])
        if number == 15:
            gpu.save(path)
            cpu.restore(path)
        if number == 25:
            cpu.save(path)
            gpu.restore(path)
        expected, found = (
            loop.step_slots(
                {slot: {"x": frame} for index, slot in enumerate(loop.slots.values()) if number % (index + 1) == 0}
            )
            for loop in (cpu, gpu)
        )
        for (cpu_slot, wanted), (gpu_slot, got) in zip(expected.items(), found.items(), strict=True):
            assert cpu_slot.name == gpu_slot.name
            np.testing.assert_array_equal(got["y"], wanted["y"], err_msg=f"step {number}")
    rows = [slot.index for slot in gpu.slots.values()]
    np.testing.assert_array_equal(gpu.state()["h"][rows], cpu.state()["h"][rows])
    cpu.close()
    gpu.close()
    assert not machine.gpu.allocations


def test_a_stream_goes_to_the_cpu_and_back_into_another_row(machine: Machine, tmp_path: Path) -> None:
    """Its neighbours keep their states bit by bit, NaN included; one with a step in flight too."""
    path, clip = tmp_path / "stream.safetensors", frames(24, 1)
    with StepLoop.open(machine.onnx, keep_float16=True) as alone:
        expected = [(alone.step(x=frame)["y"], alone.state()["h"]) for frame in clip]
    gpu = StepLoop(machine.open(), name="engine", slots=3)
    cpu = StepLoop.open(machine.onnx, slots=2, keep_float16=True)
    a, b, c = (gpu.attach(name) for name in "abc")
    for frame in clip[:8]:
        gpu.step_slots({a: {"x": frame}, c: {"x": frame}})
    poison = np.full_like(gpu.state(b)["h"], np.nan)
    gpu.load_state({"h": poison}, b)
    gpu.save(path, c, frame=8)
    cpu.restore(path, there := cpu.attach("there"))
    for frame in clip[8:16]:
        cpu.step_slots({there: {"x": frame}})
    cpu.save(path, there, frame=16)
    gpu.detach(c)
    running = gpu.step_slots_async({a: {"x": clip[8]}})
    gpu.restore(path, again := gpu.attach("again"))
    np.testing.assert_array_equal(running.result()[a]["y"], expected[8][0])
    np.testing.assert_array_equal(gpu.state(a)["h"], expected[8][1])
    np.testing.assert_array_equal(gpu.state(b)["h"], poison)
    np.testing.assert_array_equal(gpu.state(again)["h"], expected[15][1])
    for number in range(16, 24):
        outputs = gpu.step_slots({a: {"x": clip[number - 7]}, again: {"x": clip[number]}})
        np.testing.assert_array_equal(outputs[again]["y"], expected[number][0])
        np.testing.assert_array_equal(gpu.state(again)["h"], expected[number][1])
        np.testing.assert_array_equal(gpu.state(a)["h"], expected[number - 7][1])
    cpu.close()
    gpu.close()
    gpu = StepLoop(machine.open(), name="engine", slots=2)  # before its first step
    gpu.attach("other")
    gpu.restore(path, first := gpu.attach("first"))
    outputs = gpu.step_slots({gpu.slots["other"]: {"x": clip[0]}, first: {"x": clip[16]}})
    np.testing.assert_array_equal(outputs[first]["y"], expected[16][0])
    np.testing.assert_array_equal(gpu.state(gpu.slots["other"])["h"], expected[0][1])
    gpu.close()
    assert not machine.gpu.allocations


@pytest.mark.parametrize("fp16_mirrors", [False, True])
def test_learned_initial_states(
    learned_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fp16_mirrors: bool
) -> None:
    machine = Machine(learned_onnx, tmp_path, monkeypatch, fp16_mirrors=fp16_mirrors)
    machine.engine.get_tensor_shape = machine.shape_of  # type: ignore[method-assign]
    backend = machine.open()
    backend.configure(SYMBOLS)
    start = {state.name: state.initial((2, state.shape[1], 16, 24)) for state in machine.contract.states}  # type: ignore[arg-type]
    assert start["h0"].any()
    assert start["c1"].any()
    for slots in (None, [True, True]):
        for name, value in backend.read_state().items():
            np.testing.assert_array_equal(value, start[name], err_msg=name)
        for frame in frames(3):
            assert np.isfinite(backend.step({"x": frame.astype(np.float32)})["y"]).all()
        backend.reset(slots)
    backend.step({"x": frames(1)[0].astype(np.float32)})
    before = backend.read_state()
    before["h0"][1] = np.nan
    backend.write_state(before)
    backend.reset([False, True])
    for name, value in backend.read_state().items():
        np.testing.assert_array_equal(value[1], start[name][1])
        np.testing.assert_array_equal(value[0], before[name][0])
    assert np.isfinite(backend.step({"x": frames(1)[0].astype(np.float32)})["y"]).all()
    backend.close()
    assert not machine.gpu.allocations


def test_snapshot_comes_back(machine: Machine, backend: TensorRTBackend) -> None:
    backend.configure(SYMBOLS)
    clip = frames(6)
    for frame in clip[:3]:
        backend.step({"x": frame})
    snapshot = backend.read_state()
    rest = [backend.step({"x": frame})["y"] for frame in clip[3:]]
    backend.write_state(snapshot)
    np.testing.assert_array_equal([backend.step({"x": frame})["y"] for frame in clip[3:]], rest)


def test_other_sizes_start_anew(machine: Machine, backend: TensorRTBackend) -> None:
    backend.configure(SYMBOLS)
    backend.step({"x": frames(1)[0]})
    held = len(machine.gpu.allocations)
    backend.configure({"batch": 1, "height": 32, "width": 32})
    assert len(machine.gpu.allocations) == held
    clip = frames(3, 1, 32, 32)
    for frame, expected in zip(clip, reference(machine.onnx, machine.contract, clip), strict=True):
        np.testing.assert_array_equal(backend.step({"x": frame})["y"], expected["y"])


def test_sizes_outside_the_profile_are_refused(backend: TensorRTBackend) -> None:
    with pytest.raises(InputError) as caught:
        backend.configure({"batch": 4, "height": 16, "width": 16})
    assert "x: the engine takes (1, 3, 16, 16) to (3, 3, 32, 32), got (4, 3, 16, 16)" in caught.value.message


def test_failed_step_keeps_the_state(machine: Machine, backend: TensorRTBackend) -> None:
    backend.configure(SYMBOLS)
    clip = frames(4)
    for frame in clip[:2]:
        backend.step({"x": frame})
    machine.refuse(yes=True)
    with pytest.raises(DeviceError, match=r"TensorRT refused the step|CUDA_ERROR_LAUNCH_FAILED"):
        backend.step({"x": clip[2]})
    machine.refuse(yes=False)
    expected = reference(machine.onnx, machine.contract, clip)
    for frame, outputs in zip(clip[2:], expected[2:], strict=True):
        np.testing.assert_array_equal(backend.step({"x": frame})["y"], outputs["y"])


def test_out_of_memory_says_so_and_frees_what_was_taken(machine: Machine, backend: TensorRTBackend) -> None:
    machine.gpu.limit = 4000
    with pytest.raises(DeviceError) as caught:
        backend.configure(SYMBOLS)
    assert caught.value.exit_code == 6
    assert "CUDA_ERROR_OUT_OF_MEMORY: out of memory (asked for 6.1 kB of GPU memory)" in caught.value.message
    assert "fewer streams" in str(caught.value.hint)
    assert not machine.gpu.allocations


def test_description_and_times(backend: TensorRTBackend) -> None:
    assert backend.device == "cuda:0"
    assert backend.description == f"TensorRT-RTX {tensorrt_rtx.__version__}, Fake GPU"
    backend.configure(SYMBOLS)
    backend.step({"x": frames(1)[0]})
    assert backend.step_milliseconds() == {"copy_in": 0.5, "compute": 0.5, "copy_out": 0.5}


def test_close_twice(machine: Machine) -> None:
    backend = machine.open()
    backend.configure(SYMBOLS)
    backend.close()
    backend.close()
    assert not machine.gpu.allocations


def test_engine_whose_tensors_differ_from_the_contract_is_refused(machine: Machine) -> None:
    import msgspec

    right = machine.engine.inputs
    machine.engine.inputs = {name: spec for name, spec in right.items() if name != "x"}
    with pytest.raises(
        EngineMismatchError, match=r"tensors in the engine: .*state_in\.h, state_out\.h, y; in its sidecar: .*x, y"
    ):
        machine.open()
    machine.engine.inputs = {**right, "x": msgspec.structs.replace(right["x"], dtype="int32")}
    with pytest.raises(EngineMismatchError, match="x: input of int32 in the engine, input of float16 in its sidecar"):
        machine.open()


def test_engine_whose_fp16_mirror_differs_from_the_sidecar_is_refused(
    denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import msgspec

    machine = Machine(denoiser_onnx, tmp_path, monkeypatch, fp16_mirrors=True)
    (mirror,) = machine.engine.mirrors
    machine.engine.formats[mirror.output] = "LINEAR"
    with pytest.raises(EngineMismatchError, match=r"half_out\.h: format LINEAR in the engine; .* is HWC8"):
        machine.open()
    machine.engine.formats[mirror.output] = "HWC8"
    right = machine.engine.inputs
    machine.engine.inputs = {**right, mirror.input: msgspec.structs.replace(right[mirror.input], dtype="float32")}
    with pytest.raises(EngineMismatchError, match=r"half_in\.h: input of float32 in the engine, input of float16 in"):
        machine.open()
    machine.engine.inputs = machine.contract.graph_inputs
    with pytest.raises(
        EngineMismatchError, match=r"in the engine: half_out\.h, .*; in its sidecar: half_in\.h, half_out"
    ):
        machine.open()


def test_an_engine_with_more_tensors_than_its_sidecar_is_refused(
    denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stepcell sees a fp16 mirror that reads the sidecar without it."""
    machine = Machine(denoiser_onnx, tmp_path, monkeypatch)
    copies = (Fp16Mirror("h", "half_in.h", "half_out.h"),)
    machine.engine.inputs, machine.engine.outputs = engine_tensors(machine.contract, copies)
    with pytest.raises(EngineMismatchError, match=r"in the engine: half_in\.h, .*; in its sidecar: state_in\.h, "):
        machine.open()


def test_states_beyond_float16_are_infinite_in_the_fp16_mirror(machine: Machine, backend: TensorRTBackend) -> None:
    backend.configure(SYMBOLS)
    backend.step({"x": frames(1)[0]})
    state = backend.read_state()
    flat = state["h"].reshape(-1)
    flat[:4] = [1e6, -70000.0, 1e-9, 65519.9]
    backend.write_state(state)
    backend.step({"x": frames(1)[0]})
    for mirror in machine.engine.mirrors:
        run = machine.engine.runs[-1]
        half = machine.engine._at(run[mirror.input], mirror.input, "float16")
        assert half[0, 0, :4, 0].tolist() == [np.inf, -np.inf, 0.0, 65504.0]


def test_engine_that_does_not_load_is_refused(machine: Machine) -> None:
    machine.engine = None  # type: ignore[assignment]
    with pytest.raises(EngineMismatchError, match="TensorRT-RTX cannot load it") as caught:
        machine.open()
    assert "rebuild: stepcell build" in str(caught.value.hint)
