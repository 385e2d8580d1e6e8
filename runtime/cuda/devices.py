"""CUDA devices: which there are, and which one a thread uses."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

from stepcell.errors import DeviceError, MissingDependencyError
from stepcell.runtime.cuda.bindings import check, driver, initialised_driver

__all__ = [
    "Discovery",
    "Gpu",
    "current_device",
    "device_count",
    "discover",
    "driver_version",
    "ensure_device",
    "use_device",
]


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        index: CUDA device number.
        name: for example "NVIDIA GeForce RTX 4090".
        compute_capability: for example "8.9".
        memory_bytes: total memory.
    """

    index: int
    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Discovery:
    """The GPUs of a machine.

    Attributes:
        devices: empty if CUDA cannot be used.
        driver: newest CUDA version the driver supports, for example "13.0"; None: no driver.
        problem: why there is no device, in one sentence; empty if there is one.
    """

    devices: tuple[Gpu, ...]
    driver: str | None
    problem: str


def device_count() -> int:
    """Number of GPUs according to the driver library itself: works without cuda-bindings, which ONNX Runtime
    does not need.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def driver_version() -> tuple[int, int] | None:
    """Newest CUDA version the driver supports, as (major, minor); None: no driver or no cuda-bindings."""
    try:
        version = int(check(driver().cuDriverGetVersion()))
    except (DeviceError, MissingDependencyError, RuntimeError):  # RuntimeError: cuda-bindings finds no libcuda
        return None
    return (version // 1000, version % 1000 // 10) if version else None


def discover() -> Discovery:
    """The GPUs of this machine. Never raises: `problem` says what is missing."""
    try:
        module = initialised_driver()
        devices = tuple(_gpu(module, index) for index in range(check(module.cuDeviceGetCount())))
    except MissingDependencyError as error:
        count = device_count()
        if not count:
            return Discovery((), None, "no NVIDIA driver is installed, or it sees no GPU")
        return Discovery((), None, f"the driver sees {count} of them, but {error.message} ({error.hint})")
    except DeviceError as error:
        return Discovery((), None, error.message)
    version = driver_version()
    text = f"{version[0]}.{version[1]}" if version else None
    return Discovery(devices, text, "" if devices else "CUDA finds no device")


def _gpu(module: Any, index: int) -> Gpu:
    device, names = check(module.cuDeviceGet(index)), module.CUdevice_attribute
    major = check(module.cuDeviceGetAttribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
    minor = check(module.cuDeviceGetAttribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    return Gpu(
        index=index,
        name=check(module.cuDeviceGetName(256, device)).split(b"\0")[0].decode(),
        compute_capability=f"{major}.{minor}",
        memory_bytes=int(check(module.cuDeviceTotalMem(device))),
    )


def use_device(index: int) -> None:
    """Make a GPU the current one of this thread: its primary context, which the CUDA runtime uses too."""
    module = driver()
    check(module.cuCtxSetCurrent(_primary_context(module, index)))


def ensure_device(index: int) -> None:
    """`use_device` where this thread uses none yet: a thread that only reads an array may not have used CUDA before."""
    if not int(check(driver().cuCtxGetCurrent())):
        use_device(index)


def current_device() -> int:
    """Number of the GPU that this thread uses."""
    return int(check(driver().cuCtxGetDevice()))


@functools.cache
def _primary_context(module: Any, index: int) -> Any:
    """Retained until the process ends, as the CUDA runtime does."""
    initialised_driver()
    return check(module.cuDevicePrimaryCtxRetain(check(module.cuDeviceGet(index))))
