"""Timing of a step of a plan on this machine's GPU."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from stepcell.errors import DeviceError
from stepcell.runtime import cuda
from stepcell.runtime.engine.profile import Profile
from stepcell.runtime.engine.tensorrt_module import Messages, TensorRT, dtype_name, make_logger, no_collection

__all__ = ["step_milliseconds"]

_WARM_UP = 20
_ROUNDS, _STEPS = 15, 10


@no_collection()
def step_milliseconds(
    library: TensorRT,
    plan: bytes,
    profiles: Mapping[str, Profile],
    *,
    device: int = 0,
) -> float:
    """Median time of a step at the `opt` sizes in milliseconds, queued one by one as the step loop does it.

    Args:
        profiles: size ranges of every input of the engine.
        device: CUDA number of the GPU.

    Raises:
        DeviceError: the plan cannot be loaded or run, or its buffers do not fit in memory.
        MissingDependencyError: cuda-bindings is not installed.
    """
    trt, messages = library.module, Messages()

    def accept(result: object, what: str) -> None:
        if not result:
            raise DeviceError(f"timing the engine: TensorRT refused {what}: {messages.explain()}")

    cuda.use_device(device)
    with ExitStack() as owned:
        runtime = trt.Runtime(make_logger(trt, messages))
        engine = runtime.deserialize_cuda_engine(plan)
        accept(engine, "the plan")
        context = engine.create_execution_context()
        accept(context, "an execution context")
        for name, profile in profiles.items():
            accept(context.set_input_shape(name, profile.opt), f"{name}: shape {profile.opt}")
        stream, events = cuda.Stream(), [cuda.Event() for _ in range(_ROUNDS + 1)]
        owned.callback(stream.close)
        for event in events:
            owned.callback(event.close)
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            buffer = cuda.DeviceBuffer(_nbytes(trt, engine, name, tuple(context.get_tensor_shape(name))))
            owned.callback(buffer.close)
            buffer.clear(stream)
            accept(context.set_tensor_address(name, buffer.address), f"{name}: its address")
        for _ in range(_WARM_UP):
            accept(context.execute_async_v3(stream.handle), "a step")
        for event in events[:-1]:
            event.record(stream)
            for _ in range(_STEPS):
                accept(context.execute_async_v3(stream.handle), "a step")
        events[-1].record(stream)
        stream.synchronize()
        rounds = [later.milliseconds_since(event) for event, later in itertools.pairwise(events)]
        del context, engine, runtime  # in this order: each depends on the next
    return statistics.median(rounds) / _STEPS


def _nbytes(trt: Any, engine: Any, name: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor's buffer; the format kHWC8 pads the channels to a multiple of 8."""
    if engine.get_tensor_format(name) == trt.TensorFormat.HWC8:
        batch, channels, *rest = shape
        shape = (batch, -(-channels // 8) * 8, *rest)
    return math.prod(shape) * np.dtype(dtype_name(engine.get_tensor_dtype(name))).itemsize
