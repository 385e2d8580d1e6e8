"""CUDA driver access: devices, streams, events, graphs, memory, copies and kernel launches.

All of it goes through the driver API of `cuda-bindings` (extra `cuda`), and every status is checked. Asking which
devices there are works on every machine, with or without a driver and the extra.

Only the driver API is used: kernels must be loaded through it (the runtime API loads cubins from CUDA 12.8 on,
JetPack 6 has 12.6), and cuda-bindings 13 works with a driver for CUDA 12 there, whereas its runtime API refuses it.
Why not `cuda-core`: version 1.2 was tried against a driver that does nothing. Recording an event takes 0.08 us instead
of 0.20 us and a copy 0.16 us instead of 0.27 us, some 2 us of a step's 15 calls, but a kernel launch takes 1.9 us
instead of 0.64 us, the import 200 ms instead of 50 ms, it has no copies of rows, does not import with cuda-bindings
12.8, and calls the C library directly, so that nothing could be tested on a machine without a GPU. Its DLPack reader
would save 100 lines and 2 us for an array that is on the GPU, which does not pay for the dependency.
"""

from stepcell.runtime.cuda.bindings import check, driver
from stepcell.runtime.cuda.device_array import DeviceArray, OnDevice, is_on_device, read_device_array
from stepcell.runtime.cuda.devices import (
    Discovery,
    Gpu,
    current_device,
    device_count,
    discover,
    driver_version,
    use_device,
)
from stepcell.runtime.cuda.kernels import Kernel
from stepcell.runtime.cuda.memory import (
    DeviceBuffer,
    PinnedArray,
    Rows,
    clear_row,
    copy_on_device,
    copy_row,
    copy_to_device,
    copy_to_host,
    device_of,
)
from stepcell.runtime.cuda.streams import DEFAULT_STREAM, Event, Graph, Stream, wait_on

__all__ = [
    "DEFAULT_STREAM",
    "DeviceArray",
    "DeviceBuffer",
    "Discovery",
    "Event",
    "Gpu",
    "Graph",
    "Kernel",
    "OnDevice",
    "PinnedArray",
    "Rows",
    "Stream",
    "check",
    "clear_row",
    "copy_on_device",
    "copy_row",
    "copy_to_device",
    "copy_to_host",
    "current_device",
    "device_count",
    "device_of",
    "discover",
    "driver",
    "driver_version",
    "is_on_device",
    "read_device_array",
    "use_device",
    "wait_on",
]
