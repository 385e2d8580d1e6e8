"""Access to the CUDA driver: its names and arguments against the real cuda-bindings, its effects on a fake driver."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as real

from stepcell.errors import DeviceError, MissingDependencyError
from stepcell.runtime import cuda
from stepcell.runtime.cuda import bindings, devices
from tools.fake_driver import FakeDriver


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    return driver


def test_every_name_that_is_used_exists() -> None:
    used = set()
    for source in Path(str(cuda.__file__)).parent.glob("*.py"):
        nodes = ast.walk(ast.parse(source.read_text()))
        names = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
        used.update(name for name in names if re.match(r"cu[A-Z]|CU[a-z_]", name))
    members = {name for enum in vars(real).values() if isinstance(enum, type) for name in dir(enum)}
    assert len(used) > 40
    assert not {name for name in used if not hasattr(real, name) and name not in members}
    faked = {name for name in used if name.startswith("cu")} - {name for name in used if re.match("cuL|cuK", name)}
    assert not {name for name in faked if not hasattr(FakeDriver, name)}, "kernels alone are not faked"


def test_discovery_finds_the_fake_gpu(fake: FakeDriver) -> None:
    assert cuda.discover() == cuda.Discovery((cuda.Gpu(0, "Fake GPU", "8.9", 1 << 30),), "13.0", "")
    cuda.use_device(0)
    assert cuda.current_device() == 0


def test_discovery_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cuda.discover()
    assert bool(found.devices) != bool(found.problem)

    def missing() -> None:
        raise MissingDependencyError("running on a GPU needs the package 'cuda'", hint="pip install 'stepcell[cuda]'")

    monkeypatch.setattr(devices, "initialised_driver", missing)
    for count, problem in (
        (0, "no NVIDIA driver is installed, or it sees no GPU"),
        (2, "the driver sees 2 of them, but running on a GPU needs the package 'cuda' (pip install 'stepcell[cuda]')"),
    ):
        monkeypatch.setattr(devices, "device_count", lambda count=count: count)
        assert cuda.discover() == cuda.Discovery((), None, problem)


def test_without_a_driver_every_request_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(flags: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    driver = FakeDriver()
    driver.cuInit = missing  # type: ignore[method-assign,assignment]
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    assert cuda.discover() == cuda.Discovery((), None, "no NVIDIA driver is installed")
    with pytest.raises(DeviceError, match="no NVIDIA driver is installed"):
        cuda.use_device(0)


def test_every_status_becomes_an_error_with_its_name(fake: FakeDriver) -> None:
    for status in real.CUresult:
        if status == real.CUresult.CUDA_SUCCESS:
            assert cuda.check((status, 5)) == 5
            assert cuda.check((status,)) is None
            continue
        with pytest.raises(DeviceError, match=rf"CUDA: {status.name}: \w+") as caught:
            cuda.check((status, None))
        assert caught.value.exit_code == 6
    assert set(bindings._HINTS) <= {status.name for status in real.CUresult}


def test_calls_take_their_arguments() -> None:
    """Each call reaches the real cuda-bindings: without a driver it fails there, and not on an argument."""
    if cuda.discover().devices:
        pytest.skip("needs a machine without a GPU: the addresses used here are not real")
    stream = object.__new__(cuda.Stream)
    stream.handle = 0
    buffer = object.__new__(cuda.DeviceBuffer)
    buffer.nbytes, buffer.address = 8, 4096
    event = object.__new__(cuda.Event)
    event.handle = 0
    array = np.zeros(2, np.float32)
    rows = cuda.Rows.of(buffer.address, array.shape, 0, 4)
    for call in (
        lambda: cuda.use_device(0),
        cuda.current_device,
        cuda.Stream,
        cuda.Event,
        lambda: cuda.DeviceBuffer(8),
        lambda: cuda.PinnedArray((2,), np.float32),
        stream.synchronize,
        lambda: stream.wait(event),
        lambda: cuda.wait_on(cuda.DEFAULT_STREAM, event),
        lambda: event.record(stream),
        lambda: event.record_on(cuda.DEFAULT_STREAM),
        event.synchronize,
        lambda: cuda.Graph.capture(stream, lambda: None),
        lambda: cuda.Graph(real.CUgraphExec()).launch(stream),
        lambda: real.cuGraphInstantiate(real.CUgraph(), 0),
        lambda: real.cuPointerGetAttribute(real.CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_MANAGED, 4096),
        lambda: cuda.device_of(buffer.address),
        lambda: cuda.copy_on_device(buffer.address, buffer.address, 8, stream),
        lambda: event.milliseconds_since(event),
        lambda: buffer.clear(stream),
        lambda: cuda.clear_row(rows, 0, stream),
        lambda: cuda.copy_row(rows, 0, rows, 1, stream),
        lambda: cuda.copy_to_device(buffer, array, stream),
        lambda: cuda.copy_to_host(array, buffer, stream),
    ):
        with pytest.raises((DeviceError, RuntimeError), match=r"driver|libcuda"):
            call()


def test_the_device_of_an_address(fake: FakeDriver) -> None:
    buffer = cuda.DeviceBuffer(16)
    assert cuda.device_of(buffer.address + 8) == 0
    assert cuda.device_of(np.zeros(4).ctypes.data) is None
    buffer.close()
    assert not fake.allocations


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_of_any_axis_are_cleared_and_copied(fake: FakeDriver, axis: int) -> None:
    stream = cuda.Stream()
    array = np.ones((2, 3, 4), np.float32)
    expected = array.copy()
    rows = cuda.Rows.of(array.ctypes.data, array.shape, axis, 4)
    index: tuple[Any, ...] = (slice(None),) * axis
    cuda.clear_row(rows, 1, stream)
    stream.synchronize()
    expected[(*index, 1)] = 0
    np.testing.assert_array_equal(array, expected)
    other = np.random.default_rng(0).random([5 if a == axis else n for a, n in enumerate(array.shape)], np.float32)
    cuda.copy_row(rows, 0, cuda.Rows.of(other.ctypes.data, other.shape, axis, 4), 4, stream)
    stream.synchronize()
    expected[(*index, 0)] = other[(*index, 4)]
    np.testing.assert_array_equal(array, expected)


def test_a_thread_without_a_device_gets_one_before_it_waits_for_an_array(fake: FakeDriver) -> None:
    """`torch.from_dlpack` may be the first use of CUDA in a thread."""
    made: list[int] = []
    fake.cuCtxGetCurrent = lambda: (real.CUresult.CUDA_SUCCESS, 0)  # type: ignore[method-assign]
    fake.cuCtxSetCurrent = lambda context: made.append(context) or (real.CUresult.CUDA_SUCCESS,)  # type: ignore
    array = cuda.DeviceArray(cuda.DeviceBuffer(16).address, (4,), np.dtype("float32"), 0, ready=cuda.Event())
    array.__dlpack__(stream=1)
    assert made == [1]
