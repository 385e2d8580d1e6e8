"""Parts of a step on a GPU: copy of the inputs, computation, copy of the outputs.

Three kinds of step are timed in turn, each until it is done: from host to host, from host to device, and from device to
device. Their differences are the copies. Overheads that the kinds do not share are counted with them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.runtime import cuda
from stepcell.runtime.backends.base import Device
from stepcell.runtime.cuda.device_array import DeviceArray
from stepcell.runtime.loop.step_loop import StepLoop

__all__ = ["Parts", "parts_of"]

_WARM_UP = 3


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """Medians in milliseconds; a part that is shorter than the noise of the measurement is 0."""

    copy_in_ms: float
    compute_ms: float
    copy_out_ms: float


def parts_of(loop: StepLoop, frames: Sequence[Mapping[str, NDArray[Any]]], steps: int) -> Parts:
    """Time the parts of the steps of an engine.

    Args:
        frames: frames of the loop's sizes; the first one is used.
        steps: number of steps of each kind.

    Raises:
        UsageError: the loop runs in ONNX Runtime.
        DeviceError: the device failed.
    """
    frame = {spec.name: np.ascontiguousarray(frames[0][spec.name], spec.dtype) for spec in loop.contract.inputs}
    index = Device.parse(loop.device).index
    cuda.use_device(index)
    with ExitStack() as owned:
        stream = cuda.Stream()
        owned.callback(stream.close)
        on_device: dict[str, DeviceArray] = {}
        for name, array in frame.items():
            buffer = cuda.DeviceBuffer(array.nbytes)
            owned.callback(buffer.close)
            cuda.copy_to_device(buffer, array, stream)
            on_device[name] = DeviceArray(buffer.address, array.shape, array.dtype, index)
        stream.synchronize()
        kinds: list[Callable[[], Any]] = [
            lambda: loop.step(**frame),
            lambda: _done(loop.step_on_device(**frame)),
            lambda: _done(loop.step_on_device(**on_device)),
        ]
        times: list[list[float]] = [[] for _ in kinds]
        for turn in range(_WARM_UP + steps):
            for kind, taken in zip(kinds, times, strict=True):
                started = time.perf_counter()
                kind()
                if turn >= _WARM_UP:
                    taken.append(time.perf_counter() - started)
        stream.synchronize()
    whole, without_out, compute = (statistics.median(taken) * 1e3 for taken in times)
    return Parts(
        copy_in_ms=round(max(0.0, without_out - compute), 4),
        compute_ms=round(compute, 4),
        copy_out_ms=round(max(0.0, whole - without_out), 4),
    )


def _done(outputs: Mapping[str, DeviceArray]) -> None:
    """Wait until the outputs are computed."""
    for array in outputs.values():
        if array.ready is not None:
            array.ready.synchronize()
