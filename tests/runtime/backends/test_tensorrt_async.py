"""TensorRT back end on a fake GPU: overlapping steps, arrays on the device, CUDA graphs."""

from __future__ import annotations

import ctypes
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.errors import DeviceError, InputError, StepcellError, UsageError
from stepcell.runtime.backends.tensorrt.backend import TensorRTBackend
from stepcell.runtime.cuda import DeviceArray
from stepcell.runtime.cuda.dlpack_capsule import from_capsule, to_capsule
from stepcell.runtime.streams.run import run_streams
from tests.fakes.counting_driver import ALLOCATING, CREATING, WAITING
from tests.fakes.fake_engine import INVALIDATED, LAUNCH_FAILED, SYMBOLS, Machine, frames, reference
from tests.fakes.frame_source import FrameSource

THEIRS = 99  # a stream of another library


@pytest.fixture
def loop(backend: TensorRTBackend) -> StepLoop:
    return StepLoop(backend, name="engine")


def expected_outputs(machine: Machine, clip: list[NDArray[Any]]) -> list[NDArray[Any]]:
    return [outputs["y"] for outputs in reference(machine.onnx, machine.contract, clip)]


class OnGpu:
    """An array of another library in the memory of the fake GPU, filled when work on that library's stream has run."""

    def __init__(self, machine: Machine, array: NDArray[Any], *, stream: int | None = THEIRS) -> None:
        self.array, self._gpu, self._stream = array, machine.gpu, stream
        _, address = machine.gpu.cuMemAlloc(array.nbytes)
        self.address, fill = address, array.tobytes()
        if stream is None:
            ctypes.memmove(address, fill, len(fill))
        else:
            machine.gpu.queue(stream, lambda: ctypes.memmove(address, fill, len(fill)))

    def free(self) -> None:
        self._gpu.cuMemFree(self.address)


class ByInterface(OnGpu):
    strides: tuple[int, ...] | None = None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.address, False),
            "strides": self.strides,
            "stream": self._stream,
        }


class ByDlpack(OnGpu):
    device = (2, 0)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int) -> Any:
        if self._stream is not None:
            self._gpu.cuEventRecord(-1, self._stream)
            self._gpu.cuStreamWaitEvent(stream, -1, 0)
        return to_capsule(self.address, self.array.shape, self.array.dtype, self.device, self)


def on_host(machine: Machine, array: DeviceArray) -> NDArray[Any]:
    """The contents that a DLPack consumer sees on its own stream."""
    address, shape, dtype, strides, device = from_capsule(array.__dlpack__(stream=THEIRS))
    assert (strides, device) == (None, (2, 0))
    machine.gpu.cuStreamSynchronize(THEIRS)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)


def test_steps_begun_ahead_equal_plain_onnx_runtime(machine: Machine, loop: StepLoop) -> None:
    clip = frames(30)
    pending = []
    for number, frame in enumerate(clip):
        ours = frame.copy()
        pending.append(loop.step_async(x=ours))
        ours[:] = 9  # a camera's buffer, overwritten at once
        if number % 4 == 3:
            pending[-1].result()  # the later one first
    expected = expected_outputs(machine, clip)
    for number, (each, y) in enumerate(zip(pending, expected, strict=True)):
        np.testing.assert_array_equal(each.result()["y"], y, err_msg=f"step {number}")
        assert each.result() is each.result()
    assert loop.latency.summary().count == len(clip) - 1


def test_a_step_uploads_a_frame_downloads_an_output_and_does_nothing_else(machine: Machine, loop: StepLoop) -> None:
    clip = frames(10)
    loop.step(x=clip[0])
    machine.counted.clear()
    for frame in clip[1:]:
        y = loop.step(x=frame)["y"]
    calls, steps = machine.counted.calls, len(clip) - 1
    assert not calls.keys() & {*ALLOCATING, *CREATING, *WAITING}
    assert machine.counted.bytes == {"up": steps * clip[0].nbytes, "down": steps * y.nbytes}
    assert calls["cuEventSynchronize"] == steps
    assert calls["cuGraphLaunch"] == (steps if machine.engine.capturable else 0)


def test_queueing_a_step_waits_for_nothing(machine: Machine, loop: StepLoop) -> None:
    clip = frames(6)
    loop.step(x=clip[0])
    machine.counted.clear()
    machine.engine.runs.clear()
    first, second = (loop.step_async(x=frame) for frame in clip[1:3])
    assert not machine.counted.calls.keys() & {*ALLOCATING, *CREATING, *WAITING, "cuEventSynchronize"}
    assert not machine.engine.runs, "nothing has run"
    loop.step_async(x=clip[3])
    assert machine.counted.calls["cuEventSynchronize"] == 1
    assert len(machine.engine.runs) == 1, "the third waits for the first and for no other"
    expected = expected_outputs(machine, clip)
    np.testing.assert_array_equal(first.result()["y"], expected[1])
    np.testing.assert_array_equal(second.result()["y"], expected[2])


def test_a_frame_is_uploaded_before_the_last_step_is_computed(machine: Machine, backend: TensorRTBackend) -> None:
    """The download is on a third stream; the streams are ordered only as far as the data requires."""
    backend.configure(SYMBOLS)
    clip = frames(3)
    machine.engine.runs.clear()
    first, second = (backend.enqueue({"x": frame}) for frame in clip[:2])
    machine.gpu.cuStreamSynchronize(backend.input_stream)
    assert not machine.engine.runs, "the uploads are done, no step has run"
    first.result()
    assert len(machine.engine.runs) == 1, "the first output is there, the second step has not run"
    second.result()
    assert len(machine.engine.runs) == 2


def test_the_states_after_steps_under_way(machine: Machine, loop: StepLoop) -> None:
    clip = frames(4)
    steps = reference(machine.onnx, machine.contract, clip)
    for frame in clip[:2]:
        loop.step_async(x=frame)
    np.testing.assert_array_equal(loop.state()["h"], steps[1]["state_out.h"])
    held = loop.step_async(x=clip[2])
    loop.reset([True, False])
    after = loop.state()["h"]
    assert not after[0].any()
    np.testing.assert_array_equal(after[1], steps[2]["state_out.h"][1])
    np.testing.assert_array_equal(held.result()["y"], steps[2]["y"])


def test_outputs_outlive_other_sizes_and_the_loop(machine: Machine, loop: StepLoop) -> None:
    clip, large = frames(2), frames(1, 1, 32, 32)
    kept = [loop.step_async(x=frame) for frame in clip]
    loop.reset()
    last = loop.step_async(x=large[0])
    loop.close()
    for each, y in zip(kept, expected_outputs(machine, clip), strict=True):
        np.testing.assert_array_equal(each.result()["y"], y)
    np.testing.assert_array_equal(last.result()["y"], expected_outputs(machine, large)[0])


def test_warm_up_and_capture_leave_no_trace(machine: Machine, backend: TensorRTBackend) -> None:
    backend.configure(SYMBOLS)
    assert len(machine.engine.runs) == 2, "one of each parity"
    assert machine.counted.calls["cuStreamBeginCapture"] == (2 if machine.engine.capturable else 0)
    assert not backend.read_state()["h"].any()
    backend.step({"x": frames(1)[0]})
    backend.configure({**SYMBOLS, "batch": 1})
    assert not backend.read_state()["h"].any()
    assert machine.counted.calls["cuStreamBeginCapture"] == (4 if machine.engine.capturable else 0)


@pytest.mark.parametrize("why", ["TensorRT", "CUDA", "enqueue"])
def test_without_a_graph_it_runs_all_the_same_and_says_so_once(
    denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture, why: str
) -> None:
    machine = Machine(denoiser_onnx, tmp_path, monkeypatch)
    machine.engine.capturable = why != "TensorRT"
    machine.gpu.failures = {"cuStreamEndCapture": INVALIDATED} if why == "CUDA" else {}
    if why == "enqueue":
        execute = machine.engine.execute_async_v3
        refused = lambda stream: not machine.gpu.is_capturing(stream) and execute(stream)  # noqa: E731
        monkeypatch.setattr(machine.engine, "execute_async_v3", refused)
    loop = StepLoop(machine.open(), name="engine")
    clip = frames(5)
    for frame, y in zip(clip, expected_outputs(machine, clip), strict=True):
        np.testing.assert_array_equal(loop.step(x=frame)["y"], y)
    loop.close()
    assert logged.text.count("without a CUDA graph") == 1
    assert not machine.gpu.live


def test_failed_kernel_comes_out_of_result_and_undoes_the_step(machine: Machine, loop: StepLoop) -> None:
    clip = frames(5)
    steps = reference(machine.onnx, machine.contract, clip)
    for frame in clip[:2]:
        loop.step(x=frame)
    failed = loop.step_async(x=clip[4])
    machine.gpu.failures = {"cuEventSynchronize": LAUNCH_FAILED}
    for _ in range(2):
        with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure"):
            failed.result()
    machine.gpu.failures = {}
    np.testing.assert_array_equal(loop.state()["h"], steps[1]["state_out.h"])
    for frame, step in zip(clip[2:], steps[2:], strict=True):
        np.testing.assert_array_equal(loop.step(x=frame)["y"], step["y"])


def test_failed_copy_keeps_the_states_and_the_frame_after_it(machine: Machine, loop: StepLoop) -> None:
    clip = frames(4)
    loop.step(x=clip[0])
    held = loop.step_async(x=clip[1])
    machine.gpu.failures = {"cuMemcpyHtoDAsync": LAUNCH_FAILED}
    with pytest.raises(DeviceError):
        loop.step_async(x=clip[3])
    machine.gpu.failures = {}
    expected = expected_outputs(machine, clip)
    np.testing.assert_array_equal(held.result()["y"], expected[1])
    for frame, y in zip(clip[2:], expected[2:], strict=True):
        np.testing.assert_array_equal(loop.step(x=frame)["y"], y)


@pytest.mark.parametrize("kind", [ByInterface, ByDlpack])
@pytest.mark.parametrize("stream", [None, THEIRS])
def test_arrays_on_the_device_are_read_there(
    machine: Machine, loop: StepLoop, kind: type[OnGpu], stream: int | None
) -> None:
    clip = frames(8)
    loop.step(x=clip[0])
    given = [kind(machine, frame, stream=stream) for frame in clip[1:]]
    machine.counted.clear()
    found = [loop.step_async(x=array) for array in given]  # type: ignore[arg-type]
    for number, (each, y) in enumerate(zip(found, expected_outputs(machine, clip)[1:], strict=True), 1):
        np.testing.assert_array_equal(each.result()["y"], y, err_msg=f"step {number}")
    assert machine.counted.bytes["up"] == 0, "nothing comes from the host"
    assert machine.counted.bytes["within"] == sum(frame.nbytes for frame in clip[1:])
    assert not machine.counted.calls.keys() & {*ALLOCATING, *CREATING, *WAITING}
    for array in given:
        array.free()


@pytest.mark.parametrize("kind", [ByInterface, ByDlpack])
def test_arrays_on_the_device_live_until_they_are_read(machine: Machine, loop: StepLoop, kind: type[OnGpu]) -> None:
    first, second = frames(2)
    loop.step(x=first)
    given = kind(machine, second)
    address, alive = given.address, weakref.ref(given)
    pending = loop.step_async(x=given)  # type: ignore[arg-type]
    del given
    gc.collect()
    assert alive() is not None, "it was let go before the step has read it"
    pending.result()
    gc.collect()
    assert alive() is None, "it is held after the step"
    machine.gpu.cuMemFree(address)


def test_arrays_on_the_device_that_do_not_fit_are_refused(machine: Machine, loop: StepLoop) -> None:
    (frame,) = frames(1)
    loop.step(x=frame)
    before = loop.state()["h"]
    wide = ByInterface(machine, frame.astype(np.float32))
    turned, elsewhere = ByInterface(machine, frame), ByDlpack(machine, frame)
    turned.strides, elsewhere.device = frame.transpose(0, 1, 3, 2).strides, (2, 1)
    small = ByDlpack(machine, frame[:1])
    outside = ByInterface(machine, frame)
    address, outside.address = outside.address, frame.ctypes.data
    for array, message in (
        (wide, "x: expected float16, got float32; on the GPU nothing is converted"),
        (turned, "x: expected a C-contiguous array, got strides"),
        (elsewhere, "x: expected an array on cuda:0, got one on cuda:1"),
        (small, r"x: expected shape \(2, 3, 16, 24\) as in the first step"),
        (outside, "expected an array on cuda:0, got ByInterface: is masked or on the host"),
    ):
        with pytest.raises(InputError, match=message):
            loop.step(x=array)
    np.testing.assert_array_equal(loop.state()["h"], before)
    outside.address = address
    for array in (wide, turned, elsewhere, small, outside):
        array.free()


def test_a_cpu_loop_refuses_arrays_of_a_gpu(machine: Machine) -> None:
    array = ByInterface(machine, frames(1)[0])
    with StepLoop.open(machine.onnx) as cpu:
        with pytest.raises(InputError, match="expected an array on the CPU, where the model runs"):
            cpu.step(x=array)
        with pytest.raises(UsageError, match="returns its outputs on the host"):
            cpu.step_on_device(x=frames(1)[0])
    array.free()


def test_outputs_that_stay_on_the_device(machine: Machine, loop: StepLoop) -> None:
    clip = frames(12)
    expected = expected_outputs(machine, clip)
    loop.step(x=clip[0])
    machine.counted.clear()
    last = None
    for number, frame in enumerate(clip[1:], 1):
        y = loop.step_on_device(x=frame)["y"]
        assert y.__cuda_array_interface__["typestr"] == "<f2"
        if last is not None:  # still valid: the step after the next has not started
            np.testing.assert_array_equal(on_host(machine, last), expected[number - 1], err_msg=f"step {number}")
        last = y
    assert machine.counted.bytes["down"] == 0, "nothing goes to the host"
    assert machine.counted.calls["cuStreamSynchronize"] == 0
    np.testing.assert_array_equal(loop.step(x=clip[0])["y"].shape, expected[0].shape)
    with pytest.raises(BufferError):
        y.__dlpack__(copy=True)


def test_an_output_is_the_next_model_s_input(machine: Machine, backend: TensorRTBackend, loop: StepLoop) -> None:
    """y of one loop goes into the next step as x: both are three channels of float16."""
    clip = frames(4)
    expected = reference(machine.onnx, machine.contract, [clip[0]])[0]["y"]
    y = loop.step_on_device(x=clip[0])["y"]
    found = loop.step(x=y)["y"]
    with StepLoop.open(machine.onnx, keep_float16=True) as cpu:
        cpu.step(x=clip[0])
        np.testing.assert_array_equal(found, cpu.step(x=expected)["y"])


def test_slots_begun_ahead_equal_the_cpu(machine: Machine) -> None:
    clip = frames(24, 1)
    gpu, cpu = StepLoop(machine.open(), slots=3), StepLoop.open(machine.onnx, slots=3, keep_float16=True)
    slots = [(gpu.attach(), cpu.attach()) for _ in range(3)]
    pending, expected = [], []
    for number, frame in enumerate(clip):
        due = [pair for index, pair in enumerate(slots) if number % (index + 1) == 0]
        pending.append(gpu.step_slots_async({mine: {"x": frame} for mine, _ in due}))
        expected.append(list(cpu.step_slots({theirs: {"x": frame} for _, theirs in due}).values()))
    for number, (each, wanted) in enumerate(zip(pending, expected, strict=True)):
        for got, want in zip(each.result().values(), wanted, strict=True):
            np.testing.assert_array_equal(got["y"], want["y"], err_msg=f"step {number}")
    assert gpu.step_slots_async({}).result() == {}
    for loop in (gpu, cpu):
        loop.close()


def test_closed_loop_refuses(loop: StepLoop) -> None:
    loop.close()
    with pytest.raises(StepcellError, match="this loop is closed"):
        loop.step_async(x=frames(1)[0])


@pytest.mark.parametrize("slots", [None, 2])
def test_a_run_of_streams_equals_step_after_step(machine: Machine, tmp_path: Path, slots: int | None) -> None:
    """`run_streams` starts a step before the results of the last one are there."""
    clips = [[frame[0] for frame in frames(25)], [frame[0] for frame in frames(17)[::-1]]][: slots or 1]
    expected = []
    for clip in clips:
        with StepLoop(machine.open(), name="engine") as loop:
            expected.append([loop.step(x=frame[None])["y"][0] for frame in clip])
    paths = [tmp_path / f"{number}.npy" for number in range(len(clips))]
    sources = [FrameSource(str(number), clip) for number, clip in enumerate(clips)]
    with StepLoop(machine.open(), name="engine", slots=slots) as loop:
        assert loop.overlaps
        result = run_streams(loop, sources, paths)
    assert [report.frames for report in result.streams] == [len(clip) for clip in clips]
    for path, wanted in zip(paths, expected, strict=True):
        worst = np.abs(np.load(path).astype(np.float32) - np.float32(wanted)).max()
        assert worst < 2e-3, f"worst difference {worst:g}"
    assert machine.engine.stale == 0
