from __future__ import annotations

import gc
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx

from stepcell.errors import DeviceError, MissingDependencyError, PluginError, UsageError
from stepcell.runtime import cuda
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.engine_check import check_engine
from stepcell.runtime.engine.options import BuildOptions, parse_memory_pool, parse_targets
from stepcell.runtime.engine.tensorrt_module import (
    Messages,
    dtype_name,
    load_tensorrt,
    make_logger,
    no_collection,
)
from tests.runtime.engine.lines_logged import lines_logged


@pytest.fixture
def only_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX under the Enterprise module's name: the interface stepcell uses is the same."""
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)


def gpu(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    devices = tuple(cuda.Gpu(index, "Test GPU", each, 1 << 30) for index, each in enumerate(capabilities))
    problem = "" if devices else "CUDA: cudaErrorNoDevice: no CUDA-capable device is detected"
    monkeypatch.setattr(cuda, "discover", lambda: cuda.Discovery(devices, "13.0", problem))


@pytest.mark.usefixtures("only_rtx")
def test_auto_takes_what_is_there() -> None:
    library = load_tensorrt("auto")
    assert (library.flavor, library.name, library.version) == (
        "tensorrt-rtx",
        "TensorRT-RTX",
        tensorrt_rtx.__version__,
    )


@pytest.mark.usefixtures("both")
def test_auto_prefers_enterprise() -> None:
    assert load_tensorrt("auto").flavor == "tensorrt"
    assert load_tensorrt("tensorrt-rtx").flavor == "tensorrt-rtx"


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match="no TensorRT is installed") as caught:
        load_tensorrt("auto")
    assert "stepcell[rtx]" in str(caught.value.hint)


def test_a_broken_enterprise_is_not_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert load_tensorrt("auto").flavor == "tensorrt-rtx"
    assert "libnvinfer.so.10" in logged.messages[0]
    assert logged.messages[0].endswith("TensorRT-RTX is used instead")


@pytest.mark.usefixtures("both")
def test_enterprise_needs_a_gpu_to_build(
    denoiser_onnx_fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch)
    with pytest.raises(DeviceError, match="TensorRT builds on the GPU that will run the engine, and there is none"):
        build_engine(denoiser_onnx_fixed, tmp_path / "m.engine", BuildOptions(flavor="tensorrt"))


@pytest.mark.usefixtures("both")
def test_enterprise_path_from_build_to_check(
    denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, "8.7")
    engine = tmp_path / "m.engine"
    options = BuildOptions(flavor="tensorrt", compute_capabilities=("8.7",), opt_shapes={"x": (1, 3, 32, 32)})
    with lines_logged() as said:
        info = build_engine(denoiser_onnx, engine, options)
    assert info.contents.fingerprint.flavor == "tensorrt"
    assert info.contents.fingerprint.compute_capabilities == ("8.7",)
    assert any("cannot host the plugin" in line for line in said)
    assert check_engine(engine).tensorrt.flavor == "tensorrt"


@pytest.mark.usefixtures("both")
@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_enterprise_timing_cache_is_kept(
    denoiser_onnx_fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, "8.7")
    cache = tmp_path / "timing.cache"
    for _ in range(2):
        build_engine(
            denoiser_onnx_fixed, tmp_path / "m.engine", BuildOptions(flavor="tensorrt", timing_cache=str(cache))
        )
        assert cache.stat().st_size > 0


@pytest.mark.usefixtures("both")
def test_enterprise_refusals(denoiser_onnx_fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, "8.7")

    def build(**options: Any) -> None:
        build_engine(denoiser_onnx_fixed, tmp_path / "m.engine", BuildOptions(flavor="tensorrt", **options))

    with pytest.raises(UsageError, match=r"builds only for the GPU it runs on \(Test GPU: 8\.7\), got 8\.6, 8\.9"):
        build(compute_capabilities=("8.6", "8.9"))
    with pytest.raises(PluginError, match=r"--plugin on: TensorRT .* cannot host the plugin"):
        build(plugin="on")
    assert not list(tmp_path.iterdir())


def test_logger_collects_and_shows_only_when_asked(logged: pytest.LogCaptureFixture) -> None:
    severity = tensorrt_rtx.ILogger
    messages = Messages()
    for verbose in (False, True):
        logger = make_logger(tensorrt_rtx, messages, verbose=verbose)
        logger.log(severity.ERROR, "bad")
        logger.log(severity.WARNING, "hm")
        logger.log(severity.INFO, "so")
    assert (messages.errors, messages.warnings) == (["bad"] * 2, ["hm"] * 2)
    assert logged.messages == ["[error] bad", "[warning] hm", "[info] so"]


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_stays_off_until_the_last_thread_leaves(enabled: bool) -> None:
    """A leaves while B is still inside: B's block must not see collection switched on."""
    a_entered, b_entered, a_left = (threading.Event() for _ in range(3))
    seen: list[bool] = []

    def a() -> None:
        with no_collection():
            a_entered.set()
            b_entered.wait(10)
        a_left.set()

    def b() -> None:
        a_entered.wait(10)
        with no_collection():
            b_entered.set()
            a_left.wait(10)
            seen.append(gc.isenabled())

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        threads = [threading.Thread(target=each) for each in (a, b)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert seen == [False]
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_collection_is_paused_in_nested_blocks_and_decorated_functions() -> None:
    @no_collection()
    def decorated() -> bool:
        with no_collection(), no_collection():
            pass
        return gc.isenabled()

    assert gc.isenabled()
    assert not decorated()
    assert gc.isenabled()


def test_a_logger_lives_as_long_as_the_process() -> None:
    """TensorRT's plugin registry calls the logger of the first builder, also when both are gone: a crash."""
    logger = weakref.ref(make_logger(tensorrt_rtx, Messages()))
    gc.collect()
    assert logger() is not None


def test_a_missing_driver_is_not_the_explanation_of_another_error() -> None:
    driver = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35)"
    assert Messages([driver, "x is wrong", driver]).explain() == "x is wrong"
    assert Messages([driver]).explain() == driver
    assert Messages().explain() == "TensorRT gave no reason"


def test_dtype_names() -> None:
    assert [dtype_name(getattr(tensorrt_rtx, name)) for name in ("float16", "float32", "int64")] == [
        "float16",
        "float32",
        "int64",
    ]
    assert dtype_name(tensorrt_rtx.DataType.FP8) == "fp8"


@pytest.mark.parametrize(
    ("text", "mib"), [("workspace:1", 1), ("workspace:4096", 4096), ("workspace:512M", 512), ("workspace:2G", 2048)]
)
def test_memory_pool(text: str, mib: int) -> None:
    assert parse_memory_pool(text) == mib


@pytest.mark.parametrize(
    "text", ["", "4096", "workspace", "workspace:-1", "workspace:1.5", "dlaSRAM:1", "workspace:9K"]
)
def test_memory_pool_of_another_form(text: str) -> None:
    with pytest.raises(UsageError, match="--memPoolSize: expected workspace:MiB"):
        parse_memory_pool(text)


def test_targets() -> None:
    assert parse_targets("8.6, 8.9,8.6") == ("8.6", "8.9")
    for text in ("", "86", "sm86", "8.6;8.9", "8.6,", "8.x"):
        with pytest.raises(UsageError, match=r"expected MAJOR\.MINOR"):
            parse_targets(text)
