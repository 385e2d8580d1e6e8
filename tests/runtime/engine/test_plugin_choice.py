"""Choice between plugin and native layers, and the timing of both.

No TensorRT that hosts plugins can be installed here, so TensorRT-RTX takes its place: registry, creators and fields are
real, its builder builds the native plan, and only the build of the plan with the plugin is replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx

from stepcell.errors import BuildError, DeviceError, MissingDependencyError, PluginError, UsageError
from stepcell.plugins import prepare
from stepcell.plugins.fp16_mirrors import Fp16Mirror
from stepcell.plugins.kernels import store
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.compile import arguments_of, cell_word, source_digest
from stepcell.plugins.kernels.image import SCHEMA, ImageInfo, KernelImage, write_image
from stepcell.plugins.prepare import PreparedModel
from stepcell.plugins.tensorrt.fields import PLUGIN_VERSION, interface_digest
from stepcell.runtime import cuda
from stepcell.runtime.engine import build as engine_build
from stepcell.runtime.engine import plugin_choice, timing
from stepcell.runtime.engine.build import EngineInfo, build_engine
from stepcell.runtime.engine.engine_check import check_engine, register_plugins
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.engine.plan import BuiltPlan, build_plan
from stepcell.runtime.engine.profile import Profile, engine_profiles
from stepcell.runtime.engine.sidecar import rebuild_command
from stepcell.runtime.engine.tensorrt_module import TensorRT
from tests.runtime.engine.lines_logged import lines_logged

CELL = "gru_x8_h8_k3x3_soft_float32"  # of the denoiser of these tests
WITH_PLUGIN = b"a plan with the plugin"
MIRRORS = (Fp16Mirror("h", "half_in.h", "half_out.h"),)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose TensorRT can host the plugin."""
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", tensorrt_rtx)
    gpu = cuda.Gpu(0, "Test GPU", "8.7", 1 << 30)
    monkeypatch.setattr(cuda, "discover", lambda: cuda.Discovery((gpu,), "13.0", ""))
    for module in ("options", "plugin_choice"):
        monkeypatch.setattr(f"stepcell.runtime.engine.{module}.plugin_unavailable", lambda *_: "")


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    return fill(tmp_path / "kernels", CellConfig.from_label(CELL))


def fill(folder: Path, cell: CellConfig) -> Path:
    """A folder as `stepcell kernels compile` fills it, with other bytes for the code."""
    folder.mkdir()
    for kernel, tile in store.wanted(cell, "8.7"):
        cubin = f"{kernel} {tile.label}".encode()
        info = ImageInfo(
            schema=SCHEMA,
            key=f"{kernel}-sm87-{tile.label}",
            source=source_digest(),
            kernel=kernel,
            cell=cell_word(kernel, cell),
            tile=tile.label,
            capability="8.7",
            entry=kernel,
            warps=4,
            shared_bytes=0,
            registers=0,
            tensor_core_instructions=0,
            spill_instructions=0,
            grid_pixels=64,
            grid_channels=1,
            max_pixels=1 << 20,
            arguments=arguments_of(kernel),
            sha256=hashlib.sha256(cubin).hexdigest(),
            triton="",
        )
        write_image(KernelImage(info, cubin), folder)
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Plugins that the replaced build has created."""
    plugins: list[Any] = []

    def build(library: Any, prepared: PreparedModel, **rest: Any) -> BuiltPlan:
        if not prepared.operators:
            return build_plan(library, prepared, **rest)
        (node,) = [node for node in prepared.model.graph.node if node.domain]
        assert not prepared.model.functions
        assert prepared.fp16_mirrors == MIRRORS
        assert prepared.channels_last == {"half_in.h", "half_out.h"}
        assert "half_in.h" in node.input
        assert prepared.data == prepared.model.SerializeToString(deterministic=True)
        creator: Any = tensorrt_rtx.get_plugin_registry().get_creator(node.op_type, PLUGIN_VERSION, "stepcell")
        label = next(each.s for each in node.attribute if each.name == "cell")
        text = tensorrt_rtx.PluginField("cell", np.frombuffer(label, np.int8), tensorrt_rtx.PluginFieldType.CHAR)
        number = tensorrt_rtx.PluginField("fp16_mirror", np.ones(1, np.int32), tensorrt_rtx.PluginFieldType.INT32)
        fields = tensorrt_rtx.PluginFieldCollection([text, number])
        plugins.append(creator.create_plugin(node.name, fields, tensorrt_rtx.TensorRTPhase.BUILD))
        return BuiltPlan(
            WITH_PLUGIN, {"float16": 1}, None, (), prepared, engine_profiles(rest["profiles"], prepared.inputs)
        )

    monkeypatch.setattr(engine_build, "build_plan", build)
    return plugins


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`times(plugin=0.2, native=0.3)`: milliseconds of a step with the plugin and without."""

    def fix(*, plugin: float, native: float) -> None:
        def milliseconds(library: Any, plan: bytes, profiles: Any) -> float:
            mirrors = {"half_in.h"} if plan == WITH_PLUGIN else set()
            assert set(profiles) == {"x", "state_in.h"} | mirrors
            assert all(profiles[name] == profiles["state_in.h"] for name in mirrors)
            return plugin if plan == WITH_PLUGIN else native

        monkeypatch.setattr(plugin_choice, "step_milliseconds", milliseconds)

    return fix


def build(onnx: Path, folder: Path, **options: Any) -> tuple[EngineInfo, list[str]]:
    options = {"flavor": "tensorrt", "opt_shapes": {"x": (1, 3, 128, 128)}} | options
    with lines_logged() as said:
        return build_engine(onnx, folder / "m.engine", BuildOptions(**options)), said


@pytest.mark.parametrize(("plugin", "native", "used"), [(0.2, 0.3, True), (0.3, 0.2, False), (0.25, 0.25, False)])
def test_auto_keeps_the_faster(
    denoiser_onnx: Path, tmp_path: Path, kernels: Path, made: Any, times: Any, plugin: float, native: float, used: bool
) -> None:
    times(plugin=plugin, native=native)
    info, said = build(denoiser_onnx, tmp_path, kernels=str(kernels))
    word = "on" if used else "off"
    line = f"plugin:  {word}; {plugin:.3f} ms a step with the plugin, {native:.3f} ms with TensorRT's own layers"
    assert line in said
    assert ((tmp_path / "m.engine").read_bytes() == WITH_PLUGIN) is used
    found = info.contents.plugin
    assert found is not None
    assert (found.used, found.cells) == (used, (CELL,))
    assert (found.plugin_milliseconds, found.native_milliseconds) == (plugin, native)
    fingerprint = info.contents.fingerprint
    expected = (PLUGIN_VERSION, interface_digest()) if used else (None, None)
    assert (fingerprint.plugin_version, fingerprint.plugin_sha256) == expected
    assert info.contents.fp16_mirrors == (MIRRORS if used else ())
    assert list(info.contents.profiles) == ["x", "state_in.h"]
    assert info.contents.fingerprint.onnx_sha256 == hashlib.sha256(denoiser_onnx.read_bytes()).hexdigest()
    checked = check_engine(tmp_path / "m.engine")
    register_plugins(checked)
    assert checked.sidecar == info.contents
    assert f"--kernels {kernels}" in rebuild_command(checked.sidecar, tmp_path / "m.engine")
    wanted = store.wanted(CellConfig.from_label(CELL), "8.7", 64 * 64)  # pixels of the state at these sizes
    assert [image.info.key for image in made[0].images] == [
        f"{name}-sm87-{tile.label}" for name, tile in wanted if name != "narrow_state"
    ]


def test_on_takes_the_plugin_untimed(denoiser_onnx: Path, tmp_path: Path, kernels: Path, made: list[Any]) -> None:
    info, said = build(denoiser_onnx, tmp_path, kernels=str(kernels), plugin="on")
    assert f"plugin:  on; it runs {CELL}" in said
    assert (tmp_path / "m.engine").read_bytes() == WITH_PLUGIN
    assert info.contents.plugin is not None
    assert info.contents.plugin.plugin_milliseconds is None
    assert made[0].cell.label == CELL


def test_portable(denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match=r"--plugin portable: TensorRT .* cannot hold kernels in a plan"):
        build(denoiser_onnx, tmp_path, plugin="portable")
    registered: list[Any] = []
    operators: list[str] = []

    def chain(library: Any, prepared: PreparedModel, **rest: Any) -> BuiltPlan:
        nodes = [node for node in prepared.model.graph.node if node.domain]
        assert prepared.operators == {(node.domain, node.op_type) for node in nodes}
        operators.extend(node.op_type for node in nodes)
        return BuiltPlan(WITH_PLUGIN, {}, None, (), prepared, {})

    monkeypatch.setattr(tensorrt_rtx, "QuickPluginCreationRequest", object, raising=False)
    monkeypatch.setattr(prepare, "portable_kernels", lambda kernel, _, *rest: (kernel, *rest))
    monkeypatch.setattr(prepare, "register_portable", lambda _, kernels: registered.append(kernels))
    monkeypatch.setattr(engine_build, "build_plan", chain)
    info, said = build(denoiser_onnx, tmp_path, plugin="portable")
    assert operators == ["narrow_state", "gru_gates", "gru_candidate"]
    assert registered == [{(each, CELL): (each, "8.7", 64 * 64) for each in operators}]
    assert f"plugin:  portable; it runs {CELL}" in said
    assert info.contents.plugin is not None
    assert (info.contents.plugin.used, info.contents.plugin.portable) == (True, True)
    assert info.contents.fingerprint.plugin_version is None  # nothing is needed to run it
    assert not info.contents.fp16_mirrors  # others run it


def test_off_needs_no_plugin(denoiser_onnx: Path, tmp_path: Path, made: list[Any]) -> None:
    info, said = build(denoiser_onnx, tmp_path, plugin="off")
    assert info.contents.plugin is None
    assert not made
    assert not [line for line in said if "plugin" in line]


def test_without_triton_and_kernels(
    denoiser_onnx: Path, tmp_path: Path, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> KernelImage:
        raise MissingDependencyError("compiling the kernels needs the package 'triton', which is not installed")

    monkeypatch.setattr(store, "compile_kernel", missing)
    info, said = build(denoiser_onnx, tmp_path, kernels=str(tmp_path))
    reason = f"kernels for 8.7: narrow_state of {CELL} is not in {tmp_path}, and Triton, which compiles it"
    assert any(line.startswith(f"plugin:  off; {reason}") for line in said)
    assert info.contents.plugin is not None
    assert info.contents.plugin.reason.startswith(reason)
    with pytest.raises(PluginError, match="is not installed") as caught:
        build(denoiser_onnx, tmp_path, kernels=str(tmp_path), plugin="on")
    assert f"--cell {CELL}" in str(caught.value.hint)
    assert not made


def test_a_folder_filled_without_knowing_the_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, small = CellConfig.from_label("gru_x64_h64_k3x3_soft_float32"), 16 * 16
    folder = fill(tmp_path / "kernels", cell)
    assert set(store.wanted(cell, "8.7", small)) - set(store.wanted(cell, "8.7"))  # a tile that the folder lacks

    def missing(*_: Any) -> KernelImage:
        raise MissingDependencyError("compiling the kernels needs the package 'triton', which is not installed")

    monkeypatch.setattr(store, "compile_kernel", missing)
    images = prepare._images(cell, "8.7", folder, small)
    assert [(image.info.kernel, image.info.tile) for image in images] == [
        (kernel, tile.label) for kernel, tile in store.wanted(cell, "8.7")
    ]


def test_what_the_plugin_cannot_take(
    denoiser_onnx_float32: Path, denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[Any]
) -> None:
    _, said = build(denoiser_onnx_float32, tmp_path)
    assert any("computes in float32, the plugin in float16" in line for line in said)
    with pytest.raises(PluginError, match="computes in float32"):
        build(denoiser_onnx_float32, tmp_path, plugin="on")
    gpu = cuda.Gpu(0, "Test GPU", "7.5", 1 << 30)
    monkeypatch.setattr(cuda, "discover", lambda: cuda.Discovery((gpu,), "13.0", ""))
    _, said = build(denoiser_onnx, tmp_path)
    assert any(line.startswith("plugin:  off; compute capability 7.5") for line in said)
    with pytest.raises(UsageError, match=r"compute capability 7\.5"):
        build(denoiser_onnx, tmp_path, plugin="on")
    assert not made


def test_a_model_without_cells(accumulator: Any, tmp_path: Path, made: list[Any]) -> None:
    path = accumulator(shape=("batch", 3, 8, 8))
    options = {"opt_shapes": {"x": (1, 3, 8, 8)}}
    info, said = build(path, tmp_path, **options)
    assert info.contents.plugin is None
    assert not [line for line in said if "plugin" in line]
    with pytest.raises(PluginError, match="has no ConvGRU or ConvLSTM node"):
        build(path, tmp_path, plugin="on", **options)


def test_a_refused_or_untimed_plugin_is_left_out(
    denoiser_onnx: Path, tmp_path: Path, kernels: Path, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def untimed(*_: Any) -> float:
        raise DeviceError("timing the engine: TensorRT refused a step")

    monkeypatch.setattr(plugin_choice, "step_milliseconds", untimed)
    info, said = build(denoiser_onnx, tmp_path, kernels=str(kernels))
    assert "plugin:  off; timing the engine: TensorRT refused a step" in said
    assert info.contents.fingerprint.plugin_version is None

    def refused(library: Any, prepared: PreparedModel, **rest: Any) -> BuiltPlan:
        if prepared.operators:
            raise BuildError("TensorRT refused the model")
        return build_plan(library, prepared, **rest)

    monkeypatch.setattr(engine_build, "build_plan", refused)
    _, said = build(denoiser_onnx, tmp_path, kernels=str(kernels))
    assert "plugin:  off; TensorRT refused the model" in said
    with pytest.raises(BuildError, match="refused the model"):
        build(denoiser_onnx, tmp_path, kernels=str(kernels), plugin="on")


def test_a_cell_is_tuned_for_its_largest_map() -> None:
    cell, other = CellConfig.from_label(CELL), CellConfig.from_label("lstm_x3_h8_k3x3_soft_float32")
    shapes: dict[str, tuple[int, ...]] = {"a": (1, 8, 4, 4), "b": (2, 8, 6, 5), "dense": (1, 8)}
    cells = (("a", cell), ("b", cell), ("elsewhere", cell), ("dense", other))
    assert prepare._sizes(cells, shapes) == {cell: 60, other: None}


class FakeEngine:
    """The part of TensorRT that timing uses; every step takes what `durations` says next, in ms."""

    def __init__(self, durations: list[float]) -> None:
        self.durations, self.clock, self.steps = iter(durations), 0.0, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.names: tuple[str, ...] = ("x", "y")
        self.refuses = False

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        return None if plan == b"bad" else self

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def create_execution_context(self) -> FakeEngine:
        return self

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return tensorrt_rtx.DataType.FLOAT if name in ("y", "state_in.h") else tensorrt_rtx.DataType.HALF

    def get_tensor_format(self, name: str) -> Any:
        return tensorrt_rtx.TensorFormat.HWC8 if name.startswith("half_") else tensorrt_rtx.TensorFormat.LINEAR

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert set(self.addresses) == set(self.names)
        self.steps += 1
        self.clock += next(self.durations)
        return not self.refuses


@pytest.fixture
def timed_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], tuple[FakeEngine, TensorRT, list[Any]]]:
    def make(durations: list[float]) -> tuple[FakeEngine, TensorRT, list[Any]]:
        engine, memory = FakeEngine(durations), list[Any]()

        class Event:
            def record(self, stream: Any) -> None:
                self.at = engine.clock

            def milliseconds_since(self, earlier: Event) -> float:
                return self.at - earlier.at

            def close(self) -> None:
                pass

        class Buffer:
            def __init__(self, nbytes: int) -> None:
                self.nbytes, self.address, self.closed, self.cleared = nbytes, 256 * (len(memory) + 1), False, False
                memory.append(self)

            def clear(self, stream: Any) -> None:
                self.cleared = True

            def close(self) -> None:
                self.closed = True

        stream = SimpleNamespace(handle=7, synchronize=lambda: None, close=lambda: None)
        monkeypatch.setattr(cuda, "use_device", lambda _: None)
        monkeypatch.setattr(cuda, "Stream", lambda: stream)
        monkeypatch.setattr(cuda, "Event", Event)
        monkeypatch.setattr(cuda, "DeviceBuffer", Buffer)
        module = SimpleNamespace(
            Runtime=lambda _: engine, ILogger=tensorrt_rtx.ILogger, TensorFormat=tensorrt_rtx.TensorFormat
        )
        return engine, TensorRT("tensorrt", module), memory

    return make


def test_timing_is_a_median_after_a_warm_up(timed_engine: Any) -> None:
    slow_start, rounds = [9.0] * 20, [[2.0] * 10 if place < 7 else [1.5] * 10 for place in range(15)]
    rounds[3] = [50.0] * 10  # something else ran
    engine, library, memory = timed_engine([*slow_start, *(step for steps in rounds for step in steps)])
    profiles = {"x": Profile((1, 3, 4, 4), (1, 3, 8, 8), (2, 3, 8, 8))}
    assert timing.step_milliseconds(library, b"plan", profiles) == pytest.approx(1.5)
    assert engine.steps == 170
    assert engine.shapes == {"x": (1, 3, 8, 8)}
    assert [buffer.nbytes for buffer in memory] == [192 * 2, 192 * 4]
    assert all(buffer.closed and buffer.cleared for buffer in memory)


def test_timing_binds_fp16_mirrors_with_their_padding(timed_engine: Any) -> None:
    engine, library, memory = timed_engine([1.0] * 170)
    engine.names = ("x", "state_in.h", "half_in.h", "y", "half_out.h")
    engine.get_tensor_shape = lambda _: (2, 5, 4, 3)
    one = Profile((2, 5, 4, 3), (2, 5, 4, 3), (2, 5, 4, 3))
    profiles = dict.fromkeys(("x", "state_in.h", "half_in.h"), one)
    assert timing.step_milliseconds(library, b"plan", profiles) == pytest.approx(1.0)
    assert engine.shapes == dict.fromkeys(("x", "state_in.h", "half_in.h"), (2, 5, 4, 3))
    assert [buffer.nbytes for buffer in memory] == [120 * 2, 120 * 4, 2 * 4 * 3 * 8 * 2, 120 * 4, 2 * 4 * 3 * 8 * 2]


def test_timing_errors(timed_engine: Any) -> None:
    engine, library, memory = timed_engine([1.0] * 200)
    with pytest.raises(DeviceError, match="TensorRT refused the plan"):
        timing.step_milliseconds(library, b"bad", {})
    engine.refuses = True
    with pytest.raises(DeviceError, match="TensorRT refused a step"):
        timing.step_milliseconds(library, b"plan", {"x": Profile((1,), (1,), (1,))})
    assert all(buffer.closed for buffer in memory)
