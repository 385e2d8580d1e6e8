"""The GPU and the driver that a verification holds for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stepcell.runtime import cuda
from stepcell.runtime.backends.base import Device

__all__ = ["Place", "place_of"]

_MODULE_VERSION = Path("/sys/module/nvidia/version")  # of the kernel module, on Linux


@dataclass(frozen=True)
class Place:
    """A device by name, with its compute capability and driver.

    Attributes:
        name: "CPU", the name of the GPU, or the device as asked for if there is no such GPU.
        compute_capability: compute capability of the GPU; empty for a CPU.
        driver: release of the driver where the system tells it, else the CUDA version that it supports; empty: none.
    """

    name: str
    compute_capability: str = ""
    driver: str = ""


def place_of(device: str) -> Place:
    """The place that "cpu", "cuda" or "cuda:N" stands for.

    Raises:
        UsageError: another device.
    """
    parsed, found = Device.parse(device), cuda.discover()
    if parsed.kind == "cpu":
        return Place("CPU")
    gpu = next((gpu for gpu in found.devices if gpu.index == parsed.index), None)
    if gpu is None:
        return Place(device, driver=_driver(found))
    return Place(gpu.name, gpu.compute_capability, _driver(found))


def _driver(found: cuda.Discovery) -> str:
    try:
        release = _MODULE_VERSION.read_text().strip()
    except OSError:
        release = ""
    return ", ".join(filter(None, (release, f"CUDA {found.driver}" if found.driver else "")))
