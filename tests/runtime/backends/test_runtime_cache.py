"""The runtime cache of TensorRT-RTX beside an engine, with a fake cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorrt_rtx

from stepcell import StepLoop
from stepcell.runtime.backends.tensorrt.runtime_cache import cache_path
from tests.fakes.fake_engine import FakeRuntimeConfig, Machine, frames


@pytest.fixture
def machine(denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(denoiser_onnx, tmp_path, monkeypatch)


def start(machine: Machine) -> FakeRuntimeConfig:
    """The life of a process: load, one step, close."""
    config = machine.engine.config = FakeRuntimeConfig()
    with StepLoop(machine.open(), name="engine") as loop:
        loop.step(x=frames(1)[0])
    return config


def test_second_start_finds_what_the_first_compiled(machine: Machine, logged: pytest.LogCaptureFixture) -> None:
    first = start(machine)
    eager = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert (first.found, first.used) == (b"", True)
    assert first.dynamic_shapes_kernel_specialization_strategy == eager
    path = cache_path(machine.path)
    assert path.name == "model.engine.cache"
    assert path.read_bytes() == b"kernels for this GPU"
    written = path.stat().st_mtime_ns
    assert start(machine).found == b"kernels for this GPU"
    assert path.stat().st_mtime_ns == written, "nothing new, nothing written"
    assert "cache" not in logged.text


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"kernel"])
def test_a_damaged_cache_is_replaced(machine: Machine, logged: pytest.LogCaptureFixture, data: bytes) -> None:
    path = cache_path(machine.path)
    path.write_bytes(data)
    assert start(machine).found == b""
    assert path.read_bytes() == b"kernels for this GPU"
    assert logged.text.count("the kernels are compiled again") == bool(data)


def test_a_cache_that_cannot_be_read_or_written_is_no_error(machine: Machine, logged: pytest.LogCaptureFixture) -> None:
    """A folder of that name takes the place of a read-only folder, which root could write to."""
    cache_path(machine.path).mkdir()
    start(machine)
    said = " ".join(logged.text.split())
    assert "cannot be read (Is a directory): the kernels are compiled again" in said
    assert "is a folder, expected a file name: the next start compiles the kernels again" in said
