"""ONNX Runtime back end: buffers, devices, and float16 models converted to float32."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from stepcell import StepLoop
from stepcell.contract import METADATA_KEY, StepContract
from stepcell.errors import DeviceError
from stepcell.runtime.backends.base import Device
from stepcell.runtime.backends.onnxruntime import session as ort_session
from stepcell.runtime.backends.onnxruntime.backend import OrtBackend
from stepcell.runtime.backends.onnxruntime.float32_model import to_float32
from stepcell.runtime.cuda import DeviceArray
from tools.fake_driver import FakeDriver

Model = Callable[..., Path]


def test_two_buffers_are_used_alternately(accumulator: Model) -> None:
    backend = OrtBackend(accumulator(), Device("cpu"))
    backend.configure({"batch": 1, "height": 2, "width": 2})
    pair = backend._states["h"]
    assert not np.shares_memory(pair[0].host, pair[1].host)
    x = np.ones((1, 3, 2, 2), np.float32)
    for step in range(1, 6):
        backend.step({"x": x})
        assert pair[step % 2].host.max() == step, "the new state"
        assert pair[1 - step % 2].host.max() == step - 1, "the state the step read is untouched"
    backend.close()
    backend.close()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    return driver


def test_idle_rows_on_cuda_are_copied_at_their_addresses(accumulator: Model, gpu: FakeDriver) -> None:
    """Real tensors of ONNX Runtime at their addresses; the copies are made by the fake driver."""
    backend = OrtBackend(accumulator(), Device("cpu"))
    backend.configure({"batch": 3, "height": 2, "width": 2})
    old, new = backend._states["h"]
    old.host[:] = np.arange(36).reshape(old.host.shape)
    new.host[:] = -1
    kept = old.host.copy()
    backend._device = Device("cuda")
    backend._keep([0, 2])
    np.testing.assert_array_equal(new.host[[0, 2]], kept[[0, 2]])
    assert (new.host[1] == -1).all()
    backend._keep([1])
    assert len(gpu.live) == 1, "one stream"
    backend.close()
    assert not gpu.live


@pytest.mark.parametrize("stream", [None, 99])
def test_an_array_on_cuda_is_copied_behind_its_own_stream(
    accumulator: Model, gpu: FakeDriver, stream: int | None
) -> None:
    backend = OrtBackend(accumulator(), Device("cpu"))
    backend.configure({"batch": 1, "height": 2, "width": 2})
    backend._device = Device("cuda")
    assert backend.input_stream in gpu.live
    frame, theirs = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2), np.zeros((1, 3, 2, 2), np.float32)
    if stream is None:
        theirs[:] = frame
    else:
        gpu.queue(stream, lambda: np.copyto(theirs, frame))
    array = DeviceArray(theirs.ctypes.data, theirs.shape, theirs.dtype, 0, stream=stream)
    backend._copy_in(backend._inputs["x"], array)
    np.testing.assert_array_equal(backend._inputs["x"].host, frame)
    backend.close()
    assert not gpu.live


@pytest.mark.parametrize("size", [8, 512], ids=["copied", "bound"])
def test_outputs_of_any_size_belong_to_the_caller(accumulator: Model, size: int) -> None:
    backend = OrtBackend(accumulator(), Device("cpu"))
    backend.configure({"batch": 1, "height": size, "width": size})
    assert bool(backend._large) == (size == 512)
    x = np.ones((1, 3, size, size), np.float32)
    outputs = [backend.step({"x": x})["y"] for _ in range(5)]
    outputs[2][:] = 100
    assert [y.max() for y in outputs] == [1, 2, 100, 4, 5]
    assert backend.step({"x": x})["y"].max() == 6


@pytest.mark.parametrize("size", [2, 64], ids=["copied", "bound"])
def test_the_caller_s_array_may_change_between_steps(accumulator: Model, size: int) -> None:
    backend = OrtBackend(accumulator(), Device("cpu"))
    backend.configure({"batch": 1, "height": size, "width": size})
    assert bool(backend._inputs) == (size == 2)
    same, found = np.zeros((1, 3, size, size), np.float32), []
    for step in range(4):  # the same array, overwritten by every frame of a stream
        same[:] = step
        found.append(backend.step({"x": same})["y"])
    for _ in range(4):  # and a new array for every step
        found.append(backend.step({"x": np.ones_like(same)})["y"])
    assert [float(y.max()) for y in found] == [float(y.min()) for y in found] == [0, 1, 3, 6, 7, 8, 9, 10]


def test_steps_begun_ahead_run_at_once(accumulator: Model) -> None:
    with StepLoop.open(accumulator()) as loop:
        x = np.ones((1, 3, 2, 2), np.float32)
        pending = [loop.step_async(x=x) for _ in range(5)]
        assert loop.state()["h"].max() == 5
        assert [each.result()["y"].max() for each in pending] == [1, 2, 3, 4, 5]
        assert pending[2].result() is pending[2].result()
        assert loop.latency.summary().count == 4
    with StepLoop.open(accumulator(), slots=2) as loop:
        a, b = loop.attach(), loop.attach()
        ys = [loop.step_slots_async({slot: {"x": x}}) for slot in (a, b, a)]
        assert [y.result()[slot]["y"].max() for y, slot in zip(ys, (a, b, a), strict=True)] == [1, 1, 2]


@pytest.mark.parametrize("refused", [False, True])
def test_cuda_sessions_capture_graphs_where_onnx_runtime_lets_them(
    refused: bool, logged: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime refuses CUDA graphs for nodes that only the CPU provider has; the session is then opened without."""
    asked = []

    def create(model: str, options: Any, *, providers: list[Any], enable_fallback: int) -> Any:
        (name, given), _ = providers
        asked.append(given)
        if refused and given.get("enable_cuda_graph") == "1":
            raise RuntimeError("This session cannot use the graph capture feature\nas requested")
        return SimpleNamespace(get_provider_options=lambda: {name: {"enable_cuda_graph": "0", **given}})

    ort = SimpleNamespace(InferenceSession=create)
    session = ort_session._session(ort, Path("model.onnx"), "model.onnx", None, Device("cuda", 1))
    assert ort_session.captures_graphs(session) is not refused
    assert all((given["device_id"], given["use_tf32"]) == ("1", "0") for given in asked)
    assert len(asked) == 1 + refused
    assert ("without a CUDA graph, which is slower: This session cannot" in logged.text) is refused


def test_each_binding_has_a_graph_of_its_own_and_other_sizes_new_ones(accumulator: Model) -> None:
    """A graph contains the addresses it was captured with, so it must not be launched for other buffers."""
    backend = OrtBackend(accumulator(), Device("cpu"))
    backend._captures, numbers = True, []
    for size in (2, 4):
        backend.configure({"batch": 1, "height": size, "width": size})
        numbers += [options.get_run_config_entry("gpu_graph_id") for options in backend._options]
    assert len(set(numbers)) == 4


def test_absent_device_is_refused_or_replaced_as_allowed(accumulator: Model, logged: pytest.LogCaptureFixture) -> None:
    path = accumulator()
    with pytest.raises(DeviceError, match="cuda:99") as caught:
        StepLoop.open(path, "cuda:99")
    assert caught.value.exit_code == 6
    with StepLoop.open(path, "cuda:99", allow_fallback=True) as loop:
        assert loop.device == "cpu"
    said = " ".join(logged.text.split())
    assert "runs on the CPU instead" in said
    assert "[E:onnxruntime" not in said, "CUDA must not be asked for where it cannot work"


def test_threads_are_honoured(accumulator: Model) -> None:
    backend = OrtBackend(accumulator(), Device("cpu"), threads=1)
    assert backend._session.get_session_options().intra_op_num_threads == 1


def test_threads_that_sleep_where_others_need_the_cores(accumulator: Model) -> None:
    backend = OrtBackend(accumulator(), Device("cpu"), spin=False)
    backend.configure({"batch": 1, "height": 2, "width": 2})  # a session of its own
    assert backend._session.get_session_options().get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_threads_that_spin_in_a_step_leave_the_cores_to_others_after_it(denoiser_onnx_float32: Path) -> None:
    with StepLoop.open(denoiser_onnx_float32, threads=2, spin="in step", backend="onnxruntime") as loop:
        frame = np.zeros((1, 3, 128, 128), np.float32)
        idle = []
        for _ in range(15):
            loop.step(x=frame)
            started = time.process_time()
            time.sleep(0.005)
            idle.append(time.process_time() - started)
    print(f"{sorted(idle)[7] * 1e3:.2f} ms of CPU time in 5 ms of sleep")
    assert sorted(idle)[7] < 0.001  # 3.6 ms with threads that spin


def test_float16_model_runs_in_float32_and_says_so_once(denoiser_onnx: Path, logged: pytest.LogCaptureFixture) -> None:
    with StepLoop.open(denoiser_onnx) as loop:
        assert loop.contract.precision == "float32"
        assert {spec.dtype for spec in loop.contract.graph_inputs.values()} == {"float32"}
        assert "float32" in loop.description
        for _ in range(3):
            assert loop.step(x=np.ones((1, 3, 8, 8), np.float32))["y"].dtype == np.float32
    assert logged.text.count("float16 is slow on a CPU") == 1


def test_float32_form_differs_by_rounding_only(denoiser_onnx: Path, clip_path: Path) -> None:
    """Over 100 steps fed back; the tolerance is a few float16 roundings of values near 1 (2**-11)."""
    generator = np.random.default_rng(0)
    with StepLoop.open(denoiser_onnx) as wide, StepLoop.open(denoiser_onnx, keep_float16=True) as narrow:
        assert narrow.contract.precision == "float16"
        worst = 0.0
        for _ in range(100):
            x = generator.random((1, 3, 24, 32)).astype(np.float16)
            expected = wide.step(x=x)["y"]
            found = narrow.step(x=x)["y"]
            assert found.dtype == np.float16
            worst = max(worst, float(np.abs(found - expected).max()))
        state = np.abs(narrow.state()["h"] - wide.state()["h"]).max()
    assert 0 < worst < 8 * 2**-11
    assert state < 8 * 2**-11


def test_float32_form_reaches_every_corner() -> None:
    """Initialisers, constants, casts, types, subgraphs and functions."""
    half = numpy_helper.from_array(np.float16([1.5]), "half")
    branch = helper.make_graph(
        [
            helper.make_node("Constant", [], ["inner"], value=numpy_helper.from_array(np.float16([2.0]))),
            helper.make_node("Cast", ["inner"], ["chosen"], to=TensorProto.FLOAT16),
        ],
        "branch",
        [],
        [helper.make_tensor_value_info("chosen", TensorProto.FLOAT16, [1])],
    )
    function = helper.make_function(
        "test", "Scale", ["a"], ["b"],
        [
            helper.make_node("Constant", [], ["factor"], value=numpy_helper.from_array(np.float16([3.0]))),
            helper.make_node("Mul", ["a", "factor"], ["b"]),
        ],
        [helper.make_opsetid("", 20)],
    )  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.FLOAT16),
            helper.make_node("If", ["flag"], ["picked"], then_branch=branch, else_branch=branch),
            helper.make_node("Add", ["narrow", "half"], ["sum"]),
            helper.make_node("Mul", ["sum", "picked"], ["product"]),
            helper.make_node("Scale", ["product"], ["y"], domain="test"),
        ],
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1])],
        [half],
        value_info=[helper.make_tensor_value_info("narrow", TensorProto.FLOAT16, [1])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("test", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString()

    wide = to_float32(model)

    onnx.checker.check_model(wide, full_check=True)
    assert "float16" not in onnx.printer.to_text(wide)
    assert model.SerializeToString() == before
    session = onnxruntime.InferenceSession(wide.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.float64([0.25]), "flag": np.ones((), bool)})
    np.testing.assert_array_equal(y, np.float32([(0.25 + 1.5) * 2 * 3]))


def test_float32_form_keeps_weights_and_contract(denoiser_onnx: Path) -> None:
    model = onnx.load(denoiser_onnx)
    wide = to_float32(model)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in wide.graph.initializer}
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(weights[tensor.name], numpy_helper.to_array(tensor))
    narrow_contract, contract = (
        StepContract.from_json(next(p.value for p in m.metadata_props if p.key == METADATA_KEY)) for m in (model, wide)
    )
    assert narrow_contract.precision == "float16"
    assert contract.precision == "float32"
    assert [spec.name for spec in contract.outputs] == [spec.name for spec in narrow_contract.outputs]
    assert contract.inputs[0].range == narrow_contract.inputs[0].range
