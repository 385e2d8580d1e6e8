"""Load a compiled kernel and launch it: numpy-free, torch-free, nothing but the CUDA driver.

A launch writes the arguments into a block of memory that was laid out once and calls
cuLaunchKernel. It allocates nothing on the device and waits for nothing, so it can be captured in a
CUDA graph.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

from stepcell.errors import DeviceError, InputError, MissingDependencyError
from stepcell.missing import require
from stepcell.plugins.kernels.image import Argument, ImageInfo, KernelImage

__all__ = ["Launcher", "arguments_format", "check", "driver_ptx_version"]


def check(result: Sequence[Any]) -> Any:
    """The value of a CUDA driver call, which returns `(status, value...)`.

    Raises:
        DeviceError: the status is not success; the message has CUDA's name for it.
    """
    status, *values = result
    if status.value != 0:
        driver = _driver()
        name = driver.cuGetErrorName(status)[1]
        raise DeviceError(f"CUDA: {name.decode() if name else status}", hint="see `stepcell doctor`")
    return values[0] if len(values) == 1 else tuple(values) or None


def _driver() -> Any:
    return require("cuda.bindings.driver", extra="cuda", purpose="launching kernels")


def driver_ptx_version() -> int | None:
    """Ten times the newest PTX version that this machine's driver translates; None: there is no driver.

    By the table "Release History" of NVIDIA's document on PTX: CUDA 12.4 has 8.4, from 12.6 on the
    minor number is one behind (12.6 has 8.5, 12.8 has 8.7), 13.0 has 9.0.
    """
    try:
        version = int(check(_driver().cuDriverGetVersion()))
    except (DeviceError, MissingDependencyError, RuntimeError):  # cuda-bindings finds no libcuda
        return None
    major, minor = version // 1000, version % 1000 // 10
    return 10 * (major - 4) + minor - (1 if major == 12 and minor >= 6 else 0)


def arguments_format(arguments: Sequence[Argument]) -> str:
    """The block of arguments as a `struct` format: pointers, int32 and the gaps between them."""
    text, end = "<", 0
    for argument in arguments:
        text += f"{argument.offset - end}x" if argument.offset > end else ""
        text += "Q" if argument.size == 8 else "i"
        end = argument.offset + argument.size
    return text


def _overlapping(driver: Any, info: ImageInfo) -> Any:
    """A launch, but for its pixels and stream, that starts before the kernel ahead of it in the stream is done."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimY, config.gridDimZ = info.grid_channels, info.splits
    config.blockDimX, config.blockDimY, config.blockDimZ = 32 * info.warps, 1, 1
    config.sharedMemBytes = info.shared_bytes
    config.attrs, config.numAttrs = [attribute], 1
    return config


class Launcher:
    """A kernel in the memory of the current device. For one thread at a time, and one stream.

    A split kernel counts the programs that have arrived (kernels/split.py) in memory of the launcher's own,
    which is set to zero once; every launch leaves it at zero. Two launches at a time may not share it,
    so every execution context has launchers of its own.

    Args:
        image: compiled for this device's compute capability.
        device: CUDA number of the current device.

    Attributes:
        info: of the image.
        buffers: which memory `launch` wants, in this order (signature.py).

    Raises:
        DeviceError: the driver refuses the code: another GPU, or too old a driver.
        MissingDependencyError: cuda-bindings is not installed.
    """

    def __init__(self, image: KernelImage, device: int = 0) -> None:
        driver, info = _driver(), image.info
        self.buffers = tuple(a.buffer for a in info.arguments if a.size == 8 and a.buffer)
        self.info = info
        self._launch_kernel = driver.cuLaunchKernelEx if info.overlaps else driver.cuLaunchKernel
        self._cubin = image.cubin  # the driver may read it for as long as the library is loaded
        self._library = check(driver.cuLibraryLoadData(image.cubin, [], [], 0, [], [], 0))
        kernel = check(driver.cuLibraryGetKernel(self._library, info.entry.encode()))
        if info.shared_bytes > 48 * 1024:  # more must be asked for
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuKernelSetAttribute(limit, info.shared_bytes, kernel, device))
        self._function = driver.CUfunction(int(kernel))
        self._struct = struct.Struct(arguments_format(info.arguments))
        self._block = ctypes.create_string_buffer(self._struct.size)
        start = ctypes.addressof(self._block)
        addresses = [start + argument.offset for argument in info.arguments]
        self._parameters = (ctypes.c_void_p * len(addresses))(*addresses)
        self._parameters_address = ctypes.addressof(self._parameters)
        self._memory: list[int] = []
        self._arrivals = (0,) if any(argument.name == "arrivals" for argument in info.arguments) else ()
        self._tiles = 0  # that there are counters for
        self._config = _overlapping(driver, info) if info.overlaps else None

    def prepare(self, pixels: int) -> None:
        """Get ready for launches over up to `pixels` = batch * height * width; not while a graph is captured.

        Raises:
            DeviceError: the device has no memory left.
        """
        tiles = self.info.tiles(pixels)
        if self.info.splits == 1 or tiles <= self._tiles:
            return
        driver = _driver()
        # Earlier counters stay until `close`: a captured graph may hold their address.
        self._memory.append(int(check(driver.cuMemAlloc(4 * tiles))))
        check(driver.cuMemsetD32(self._memory[-1], 0, tiles))
        check(driver.cuStreamSynchronize(0))  # the stream of a launch need not wait for that of a memset
        self._arrivals, self._tiles = (self._memory[-1],), tiles

    def launch(self, stream: int, addresses: Sequence[int], batch: int, height: int, width: int) -> None:
        """Queue the kernel.

        Args:
            stream: the CUDA stream's handle.
            addresses: of `buffers`, each a multiple of 16; 0 for one that the cell does not use.

        Raises:
            InputError: an address is not a multiple of 16, the map has too many values, or the kernel is
                split and was not prepared for as many.
            DeviceError: the driver refuses the launch.
        """
        info, pixels = self.info, batch * height * width
        together = 0
        for address in addresses:
            together |= address
        if together & 15:
            wrong = [name for name, address in zip(self.buffers, addresses, strict=True) if address & 15]
            raise InputError(f"{info.kernel}: addresses must be multiples of 16, got others for {', '.join(wrong)}")
        if not 0 < pixels <= info.max_pixels:
            raise InputError(f"{info.kernel}: takes 1 to {info.max_pixels} pixels, got {batch} x {height} x {width}")
        if info.splits > 1 and info.tiles(pixels) > self._tiles:
            raise InputError(f"{info.kernel}: was not prepared for {batch} x {height} x {width} pixels")
        self._struct.pack_into(self._block, 0, *addresses, *self._arrivals, height, width, pixels, 0, 0)
        programs = -(-pixels // info.grid_pixels)
        if self._config is None:
            # fmt: off
            (status,) = self._launch_kernel(
                self._function,
                programs, info.grid_channels, info.splits,
                32 * info.warps, 1, 1,
                info.shared_bytes, stream, self._parameters_address, 0,
            )
            # fmt: on
        else:
            self._config.gridDimX, self._config.hStream = programs, stream
            (status,) = self._launch_kernel(self._config, self._function, self._parameters_address, 0)
        if status.value:
            check((status,))

    def close(self) -> None:
        """Unload the code. Launches that are queued must be done."""
        memory, self._memory = self._memory, []
        for address in memory:
            check(_driver().cuMemFree(address))
        library, self._library = self._library, None
        if library is not None:
            check(_driver().cuLibraryUnload(library))
