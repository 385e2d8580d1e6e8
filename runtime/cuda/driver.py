"""The one door to CUDA: devices, streams, events, graphs, memory and copies, every status checked.

Built on the CUDA runtime of `cuda-bindings` (extra `cuda`). Asking what devices there are works
on every machine, also without a driver and without the extra.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stepcell.errors import DeviceError, MissingDependencyError
from stepcell.files import human_size
from stepcell.missing import require

__all__ = [
    "DEFAULT_STREAM",
    "DeviceBuffer",
    "Discovery",
    "Event",
    "Gpu",
    "Graph",
    "PinnedArray",
    "Rows",
    "Stream",
    "check",
    "clear_row",
    "copy_on_device",
    "copy_row",
    "copy_to_device",
    "copy_to_host",
    "device_count",
    "device_of",
    "discover",
    "use_device",
    "wait_on",
]

DEFAULT_STREAM = 1  # CUDA's handle for the default stream that all threads share

_HINTS = {
    "cudaErrorMemoryAllocation": "fewer streams, smaller frames, or close other programs that use the GPU",
    "cudaErrorInsufficientDriver": "there is no NVIDIA driver, or an older one than CUDA needs; see `nvidia-smi`",
    "cudaErrorNoDevice": "no GPU is visible; see `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    "cudaErrorInvalidDevice": "see `stepcell doctor` for the devices of this machine",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        index: its CUDA number.
        name: such as "NVIDIA GeForce RTX 4090".
        compute_capability: such as "8.9".
        memory_bytes: its total memory.
    """

    index: int
    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Discovery:
    """What there is.

    Attributes:
        devices: empty where CUDA cannot be used.
        driver: newest CUDA version the driver supports, such as "13.0"; None: no driver.
        problem: why there is no device, in one sentence; empty where there is one.
    """

    devices: tuple[Gpu, ...]
    driver: str | None
    problem: str


def _runtime() -> ModuleType:
    return require("cuda.bindings.runtime", extra="cuda", purpose="running on a GPU")


def check(result: Sequence[Any]) -> Any:
    """The value of a CUDA runtime call, which returns `(status, value...)`.

    Raises:
        DeviceError: the status is not success; the message has CUDA's name for it.
    """
    status, *values = result
    if status.value != 0:
        raise _error(status)
    return values[0] if len(values) == 1 else tuple(values) or None


def _error(status: Any) -> DeviceError:
    runtime = _runtime()
    name = runtime.cudaGetErrorName(status)[1].decode()
    sentence = runtime.cudaGetErrorString(status)[1].decode()
    return DeviceError(f"CUDA: {name}: {sentence}", hint=_HINTS.get(name))


def device_count() -> int:
    """GPUs as the driver counts them. It alone is asked: ONNX Runtime needs no CUDA package of Python's."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def discover() -> Discovery:
    """The GPUs of this machine. Never fails: what is missing is said in `problem`."""
    try:
        runtime = _runtime()
    except MissingDependencyError as error:
        count = device_count()
        if not count:
            return Discovery((), None, "no NVIDIA driver is installed, or it sees no GPU")
        return Discovery((), None, f"the driver sees {count} of them, but {error.message} ({error.hint})")
    try:
        version = check(runtime.cudaDriverGetVersion())
        if not version:
            return Discovery((), None, "no NVIDIA driver is installed")
        driver = f"{version // 1000}.{version % 1000 // 10}"
        devices = tuple(_gpu(runtime, index) for index in range(check(runtime.cudaGetDeviceCount())))
    except DeviceError as error:
        return Discovery((), None, error.message)
    return Discovery(devices, driver, "" if devices else "CUDA finds no device")


def _gpu(runtime: ModuleType, index: int) -> Gpu:
    properties = check(runtime.cudaGetDeviceProperties(index))
    return Gpu(
        index=index,
        name=properties.name.split(b"\0")[0].decode(),
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=int(properties.totalGlobalMem),
    )


def use_device(index: int) -> None:
    """Make a GPU the current one of this thread."""
    check(_runtime().cudaSetDevice(index))


class Stream:
    """A queue of work on the current device, independent of the default stream."""

    def __init__(self) -> None:
        runtime = _runtime()
        self.handle = int(check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))

    def synchronize(self) -> None:
        """Wait until everything queued so far is done; errors of that work are raised here."""
        check(_runtime().cudaStreamSynchronize(self.handle))

    def wait(self, event: Event) -> None:
        """Queue: what is queued here from now on starts after what the event was recorded behind."""
        wait_on(self.handle, event)

    def close(self) -> None:
        handle, self.handle = self.handle, 0
        if handle:
            check(_runtime().cudaStreamDestroy(handle))


def wait_on(stream: int, event: Event) -> None:
    """`Stream.wait` for a stream that is not ours, by its CUDA handle."""
    check(_runtime().cudaStreamWaitEvent(stream, event.handle, 0))


class Event:
    """A point in a stream's work, to be waited for and for timing."""

    def __init__(self) -> None:
        self.handle: Any = check(_runtime().cudaEventCreate())

    def record(self, stream: Stream) -> None:
        self.record_on(stream.handle)

    def record_on(self, stream: int) -> None:
        """Record on a stream that is not ours, by its CUDA handle."""
        check(_runtime().cudaEventRecord(self.handle, stream))

    def synchronize(self) -> None:
        """Wait until the work before the event is done, and for nothing else; its errors are raised here."""
        check(_runtime().cudaEventSynchronize(self.handle))

    def milliseconds_since(self, earlier: Event) -> float:
        """Time between two recorded events of work that is done."""
        return float(check(_runtime().cudaEventElapsedTime(earlier.handle, self.handle)))

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            check(_runtime().cudaEventDestroy(handle))


class Graph:
    """Work of a stream, captured once and launched as a whole, at the same addresses each time."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def capture(cls, stream: Stream, work: Callable[[], None]) -> Graph:
        """What `work` queues on `stream`, which is not run.

        Raises:
            DeviceError: it holds something that cannot be captured, or CUDA refuses the graph.
                The stream can be used as before. Errors of `work` itself pass through.
        """
        runtime = _runtime()
        # Only calls of this thread that cannot be captured are errors; other threads go on as they like.
        check(
            runtime.cudaStreamBeginCapture(
                stream.handle, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            )
        )
        try:
            work()
        except Exception:
            status, graph = runtime.cudaStreamEndCapture(stream.handle)  # whatever it says, the stream is free again
            if status.value == 0:
                runtime.cudaGraphDestroy(graph)
            runtime.cudaGetLastError()  # forgotten, or the next call of a library would report it
            raise
        try:
            graph = check(runtime.cudaStreamEndCapture(stream.handle))
            try:
                return cls(check(runtime.cudaGraphInstantiate(graph, 0)))
            finally:
                check(runtime.cudaGraphDestroy(graph))
        except DeviceError:
            runtime.cudaGetLastError()
            raise

    def launch(self, stream: Stream) -> None:
        """Queue all of it."""
        check(_runtime().cudaGraphLaunch(self._handle, stream.handle))

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            check(_runtime().cudaGraphExecDestroy(handle))


def _address(result: Sequence[Any], nbytes: int, what: str) -> int:
    try:
        return int(check(result))
    except DeviceError as error:
        raise DeviceError(f"{error.message} (asked for {human_size(nbytes)} of {what})", hint=error.hint) from error


class DeviceBuffer:
    """Memory on the current device; `address` is what TensorRT is given."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = _address(_runtime().cudaMalloc(nbytes), nbytes, "GPU memory")

    def clear(self, stream: Stream) -> None:
        """Queue filling it with zeros."""
        check(_runtime().cudaMemsetAsync(self.address, 0, self.nbytes, stream.handle))

    def close(self) -> None:
        address, self.address = self.address, 0
        if address:
            check(_runtime().cudaFree(address))


@dataclass(frozen=True)
class Rows:
    """One axis of a C-ordered array on the device, to be copied or cleared index by index.

    Attributes:
        address: of the array.
        outer: product of the sizes before the axis.
        count: size of the axis.
        inner: bytes of one index of the axis within one of `outer`.
    """

    address: int
    outer: int
    count: int
    inner: int

    @classmethod
    def of(cls, address: int, shape: Sequence[int], axis: int, itemsize: int) -> Rows:
        """Args: shape and bytes of an element of the array, and which axis."""
        return cls(address, math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]) * itemsize)


def clear_row(rows: Rows, index: int, stream: Stream) -> None:
    """Queue filling one index with zeros."""
    start, pitch = rows.address + index * rows.inner, rows.count * rows.inner
    check(_runtime().cudaMemset2DAsync(start, pitch, 0, rows.inner, rows.outer, stream.handle))


def copy_row(target: Rows, index: int, source: Rows, source_index: int, stream: Stream) -> None:
    """Queue a copy of one index of `source`, of the same sizes but for the axis, on the device."""
    assert (target.outer, target.inner) == (source.outer, source.inner), (target, source)
    runtime = _runtime()
    check(
        runtime.cudaMemcpy2DAsync(
            target.address + index * target.inner,
            target.count * target.inner,
            source.address + source_index * source.inner,
            source.count * source.inner,
            target.inner,
            target.outer,
            runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice,
            stream.handle,
        )
    )


class PinnedArray:
    """An array in page-locked host memory, from and to which copies are truly asynchronous."""

    def __init__(self, shape: Sequence[int], dtype: DTypeLike) -> None:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        runtime = _runtime()
        self._address = _address(runtime.cudaHostAlloc(size, runtime.cudaHostAllocDefault), size, "pinned host memory")
        memory: Any = (ctypes.c_ubyte * size).from_address(self._address)
        self.array: NDArray[Any] = np.frombuffer(memory, dtype=dtype).reshape(shape)

    def close(self) -> None:
        """Free the memory. `array` must not be used any more."""
        address, self._address = self._address, 0
        if address:
            check(_runtime().cudaFreeHost(address))


def copy_to_device(buffer: DeviceBuffer, array: NDArray[Any], stream: Stream) -> None:
    """Queue a copy from the host. `array` must be C-contiguous and live until the copy is done."""
    _copy(buffer.address, array.ctypes.data, _size(buffer, array), "cudaMemcpyHostToDevice", stream)


def copy_to_host(array: NDArray[Any], buffer: DeviceBuffer, stream: Stream) -> None:
    """Queue a copy to the host. `array` must be C-contiguous; it is filled once the stream is done."""
    _copy(array.ctypes.data, buffer.address, _size(buffer, array), "cudaMemcpyDeviceToHost", stream)


def copy_on_device(target: int, source: int, nbytes: int, stream: Stream) -> None:
    """Queue a copy from one address of the device to another."""
    _copy(target, source, nbytes, "cudaMemcpyDeviceToDevice", stream)


def device_of(address: int) -> int | None:
    """CUDA number of the device whose memory this is; None: it is on the host."""
    runtime = _runtime()
    attributes = check(runtime.cudaPointerGetAttributes(address))
    on_device = (runtime.cudaMemoryType.cudaMemoryTypeDevice, runtime.cudaMemoryType.cudaMemoryTypeManaged)
    return int(attributes.device) if attributes.type in on_device else None


def _size(buffer: DeviceBuffer, array: NDArray[Any]) -> int:
    assert array.flags.c_contiguous, array.strides
    assert array.nbytes == buffer.nbytes, (array.shape, array.nbytes, buffer.nbytes)
    return buffer.nbytes


def _copy(target: int, source: int, nbytes: int, kind: str, stream: Stream) -> None:
    runtime = _runtime()
    check(runtime.cudaMemcpyAsync(target, source, nbytes, getattr(runtime.cudaMemcpyKind, kind), stream.handle))
