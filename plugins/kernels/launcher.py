"""Launcher: a loaded gate kernel with the memory block of its arguments.

A launch writes the arguments into a block of memory that was laid out once and queues the kernel. It allocates nothing
on the device and waits for nothing, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from stepcell.errors import InputError
from stepcell.plugins.kernels.image import Argument, KernelImage
from stepcell.runtime import cuda

__all__ = ["Launcher", "arguments_format", "driver_ptx_version"]


def driver_ptx_version() -> int | None:
    """Ten times the newest PTX version that this machine's driver translates; None: there is no driver.

    From the table "Release History" of NVIDIA's PTX ISA: CUDA 12.4 has PTX 8.4, from 12.6 on the minor number is one
    behind (12.6 has 8.5, 12.8 has 8.7), 13.0 has 9.0.
    """
    version = cuda.driver_version()
    if version is None:
        return None
    major, minor = version
    return 10 * (major - 4) + minor - (1 if major == 12 and minor >= 6 else 0)


def arguments_format(arguments: Sequence[Argument]) -> str:
    """The block of arguments as a `struct` format: pointers, int32 and the gaps between them."""
    text, end = "<", 0
    for argument in arguments:
        text += f"{argument.offset - end}x" if argument.offset > end else ""
        text += "Q" if argument.size == 8 else "i"
        end = argument.offset + argument.size
    return text


class Launcher:
    """A kernel loaded on the current device. For one thread at a time, and one stream.

    A split kernel counts the programs that have arrived (triton/split.py) in memory of the launcher, which is set to
    zero once; every launch leaves it at zero. Two launches at a time may not share it, so every execution context has
    its own launchers.

    Args:
        image: compiled for this device's compute capability.
        device: CUDA number of the current device.

    Attributes:
        info: description of the image.
        buffers: the memory that `launch` takes, in this order (signature.py).

    Raises:
        DeviceError: the driver refuses the code: it is for another GPU, or the driver is too old.
        MissingDependencyError: cuda-bindings is not installed.
    """

    def __init__(self, image: KernelImage, device: int = 0) -> None:
        info = image.info
        self.buffers = tuple(a.buffer for a in info.arguments if a.size == 8 and a.buffer)
        self.info = info
        self._kernel = cuda.Kernel(
            image.cubin,
            info.entry,
            threads=32 * info.warps,
            shared_bytes=info.shared_bytes,
            device=device,
            overlaps=info.overlaps,
        )
        self._struct = struct.Struct(arguments_format(info.arguments))
        self._block = ctypes.create_string_buffer(self._struct.size)
        start = ctypes.addressof(self._block)
        addresses = [start + argument.offset for argument in info.arguments]
        self._parameters = (ctypes.c_void_p * len(addresses))(*addresses)
        self._parameters_address = ctypes.addressof(self._parameters)
        self._counters: list[cuda.DeviceBuffer] = []
        self._arrivals = (0,) if any(argument.name == "arrivals" for argument in info.arguments) else ()
        self._tiles = 0  # number of tiles that there are counters for

    def prepare(self, pixels: int) -> None:
        """Allocate for launches over up to `pixels` = batch * height * width; not while a graph is captured.

        Raises:
            DeviceError: the device has no memory left.
        """
        tiles = self.info.tiles(pixels)
        if self.info.splits == 1 or tiles <= self._tiles:
            return
        # Earlier counters stay until `close`: a captured graph may hold their address.
        self._counters.append(cuda.DeviceBuffer(4 * tiles))
        stream = cuda.Stream()
        self._counters[-1].clear(stream)
        stream.synchronize()  # launches are queued on other streams
        stream.close()
        self._arrivals, self._tiles = (self._counters[-1].address,), tiles

    def launch(self, stream: int, addresses: Sequence[int], batch: int, height: int, width: int) -> None:
        """Queue the kernel.

        Args:
            stream: the CUDA stream's handle.
            addresses: addresses of `buffers`, each a multiple of 16; 0 for a buffer that the cell does not use.

        Raises:
            InputError: an address is not a multiple of 16, the map is too large, or the kernel is split and
                `prepare` was not called for this size.
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
        grid = (-(-pixels // info.grid_pixels), info.grid_channels, info.splits)
        self._kernel.launch(grid, stream, self._parameters_address)

    def close(self) -> None:
        """Unload the code and free the counters. Launches that are queued must be done."""
        counters, self._counters = self._counters, []
        for buffer in counters:
            buffer.close()
        self._kernel.close()
