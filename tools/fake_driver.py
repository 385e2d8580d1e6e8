"""Fake CUDA driver: replaces `cuda.bindings.driver` on a machine without a GPU, with host memory as device memory.

Memory starts as 0xFF bytes, which is NaN in every float type. Streams are queues: queued work runs when it is waited
for and no earlier, and of other streams only the work that an event orders before it. So code that forgets to wait
reads what is not there yet. Kernels are not run; `InterpretedDriver` (tests/fakes) and `EmulatedDriver`
(tools/ptx_emulator) extend this class by a `cuLaunchKernel`. What it cannot show is how long anything takes.
"""

# ruff: noqa: N802  # the names of CUDA

from __future__ import annotations

import ctypes
import itertools
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver as real

__all__ = ["FakeDriver"]

OK = real.CUresult.CUDA_SUCCESS
DEVICE = 0  # number of the one device
ALIGNMENT = 256  # of every allocation, as in cuMemAlloc
_TEXTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "out of memory",
    "CUDA_ERROR_LAUNCH_FAILED": "unspecified launch failure",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "operation failed due to a previous error during capture",
}
Work = Callable[[], Any]
Status = tuple[Any]


class FakeDriver(types.ModuleType):
    """The driver calls that `stepcell.runtime.cuda` makes.

    Attributes:
        allocations: every block of memory that is not freed, by address.
        live: handles of streams, events and graphs that are not closed.
        limit: size in bytes above which an allocation fails.
        failures: status that a call returns, by name of the call; the calls that look here say so.
        version: version of CUDA, as `cuDriverGetVersion` returns it.
    """

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.allocations: dict[int, Any] = {}
        self.live: set[int] = set()
        self.limit = 10**9
        self.failures: dict[str, Any] = {}
        self.version = 13000
        self.CUfunction = int
        self._handles = itertools.count(7)
        self._queues: dict[int, list[Work]] = defaultdict(list)
        self._ran: dict[int, int] = defaultdict(int)
        self._recorded: dict[int, tuple[int, int]] = {}  # by event: stream, and length of its queue
        self._captures: dict[int, list[Work]] = {}
        self._graphs: dict[int, list[Work]] = {}

    def __getattr__(self, name: str) -> Any:
        """Enumerations and structures are the real ones; a call that is not faked is an error."""
        if name.startswith("CU"):
            return getattr(real, name)
        raise AttributeError(f"the fake CUDA driver has no {name}")

    # Devices

    def cuInit(self, flags: int) -> Status:
        return (OK,)

    def cuDriverGetVersion(self) -> tuple[Any, int]:
        return OK, self.version

    def cuDeviceGetCount(self) -> tuple[Any, int]:
        return OK, 1

    def cuDeviceGet(self, index: int) -> tuple[Any, int]:
        return OK, index

    def cuDeviceGetName(self, length: int, device: int) -> tuple[Any, bytes]:
        return OK, b"Fake GPU\0"

    def cuDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[Any, int]:
        major = real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        return OK, 8 if attribute == major else 9

    def cuDeviceTotalMem(self, device: int) -> tuple[Any, int]:
        return OK, 1 << 30

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, int]:
        return OK, 1

    def cuCtxSetCurrent(self, context: int) -> Status:
        return (OK,)

    def cuCtxGetCurrent(self) -> tuple[Any, int]:
        return OK, 1

    def cuCtxGetDevice(self) -> tuple[Any, int]:
        return OK, DEVICE

    def cuGetErrorString(self, status: Any) -> tuple[Any, bytes]:
        return OK, _TEXTS.get(status.name, "").encode()

    # Memory

    def allocate(self, nbytes: int) -> int:
        """Address of new memory, filled with 0xFF."""
        raw = (ctypes.c_ubyte * (nbytes + ALIGNMENT))()
        offset = -ctypes.addressof(raw) % ALIGNMENT
        block = (ctypes.c_ubyte * nbytes).from_buffer(raw, offset)
        address = ctypes.addressof(block)
        ctypes.memset(address, 0xFF, nbytes)
        self.allocations[address] = block
        return address

    def cuMemAlloc(self, nbytes: int) -> tuple[Any, int]:
        assert not self._captures, "an allocation within a capture"
        if nbytes > self.limit:
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0
        return OK, self.allocate(nbytes)

    def cuMemFree(self, address: int) -> Status:
        del self.allocations[address]
        return (OK,)

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, int]:
        return FakeDriver.cuMemAlloc(self, nbytes)

    def cuMemFreeHost(self, address: int) -> Status:
        return FakeDriver.cuMemFree(self, address)

    def cuMemcpyHtoDAsync(self, target: int, source: int, nbytes: int, stream: int) -> Status:
        """Looks into `failures`."""
        if "cuMemcpyHtoDAsync" in self.failures:
            return (self.failures["cuMemcpyHtoDAsync"],)
        return self.queue(stream, lambda: ctypes.memmove(target, source, nbytes))

    def cuMemcpyDtoHAsync(self, target: int, source: int, nbytes: int, stream: int) -> Status:
        return self.queue(stream, lambda: ctypes.memmove(target, source, nbytes))

    cuMemcpyDtoDAsync = cuMemcpyDtoHAsync  # noqa: N815

    def cuMemsetD8Async(self, address: int, value: int, nbytes: int, stream: int) -> Status:
        return self.queue(stream, lambda: ctypes.memset(address, value, nbytes))

    def cuPointerGetAttribute(self, attribute: Any, address: int) -> tuple[Any, Any]:
        if not any(start <= address < start + len(block) for start, block in self.allocations.items()):
            return real.CUresult.CUDA_ERROR_INVALID_VALUE, None
        names = real.CUpointer_attribute
        return OK, {
            names.CU_POINTER_ATTRIBUTE_MEMORY_TYPE: real.CUmemorytype.CU_MEMORYTYPE_DEVICE,
            names.CU_POINTER_ATTRIBUTE_IS_MANAGED: False,
            names.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: DEVICE,
        }[attribute]

    # Streams and events

    def queue(self, stream: int, work: Work) -> Status:
        """Queue work on a stream, or add it to the graph that the stream captures."""
        self._captures.get(stream, self._queues[stream]).append(work)
        return (OK,)

    def is_capturing(self, stream: int) -> bool:
        return stream in self._captures

    def _run(self, stream: int, end: int) -> None:
        while self._ran[stream] < end:
            work = self._queues[stream][self._ran[stream]]
            self._ran[stream] += 1
            work()

    def _create(self) -> int:
        handle = next(self._handles)
        self.live.add(handle)
        return handle

    def _destroy(self, handle: int) -> Status:
        self.live.remove(handle)
        return (OK,)

    def cuStreamCreate(self, flags: int) -> tuple[Any, int]:
        return OK, self._create()

    def cuStreamSynchronize(self, stream: int) -> Status:
        assert stream not in self._captures, "waited for a stream that captures"
        self._run(stream, len(self._queues[stream]))
        return (OK,)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> Status:
        if event in self._recorded:
            recorded = self._recorded[event]
            self.queue(stream, lambda: self._run(*recorded))
        return (OK,)

    def cuEventCreate(self, flags: int) -> tuple[Any, int]:
        return OK, self._create()

    def cuEventRecord(self, event: int, stream: int) -> Status:
        self._recorded[event] = (stream, len(self._queues[stream]))
        return (OK,)

    def cuEventSynchronize(self, event: int) -> Status:
        """Looks into `failures` when the work is done."""
        if event in self._recorded:
            self._run(*self._recorded[event])
        return (self.failures.get("cuEventSynchronize", OK),)

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[Any, float]:
        for stream, count in (self._recorded[start], self._recorded[end]):
            assert self._ran[stream] >= count, "the time of work that is not done"
        return OK, 0.5

    cuStreamDestroy = cuEventDestroy = cuGraphDestroy = cuGraphExecDestroy = _destroy  # noqa: N815

    # Graphs

    def cuStreamBeginCapture(self, stream: int, mode: Any) -> Status:
        assert stream not in self._captures
        self._captures[stream] = []
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, int]:
        """Looks into `failures` when the capture has ended."""
        work = self._captures.pop(stream)
        if "cuStreamEndCapture" in self.failures:
            return self.failures["cuStreamEndCapture"], 0
        graph = self._create()
        self._graphs[graph] = work
        return OK, graph

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, int]:
        executable = self._create()
        self._graphs[executable] = self._graphs[graph]
        return OK, executable

    def cuGraphLaunch(self, executable: int, stream: int) -> Status:
        """Looks into `failures`."""
        if "cuGraphLaunch" in self.failures:
            return (self.failures["cuGraphLaunch"],)
        assert executable in self.live
        for work in self._graphs[executable]:
            self.queue(stream, work)
        return (OK,)
