"""How long a step of a plan takes on this machine's GPU."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from stepcell.errors import DeviceError
from stepcell.plugins.fp16_mirrors import Fp16Mirror, half_shape
from stepcell.runtime import cuda
from stepcell.runtime.engine.profile import Profile, with_fp16_mirrors
from stepcell.runtime.engine.tensorrt_module import Messages, TensorRT, dtype_name, make_logger, no_collection

__all__ = ["step_milliseconds"]

_WARM_UP = 20
_ROUNDS, _STEPS = 15, 10


@no_collection()
def step_milliseconds(
    library: TensorRT,
    plan: bytes,
    profiles: Mapping[str, Profile],
    copies: Sequence[Fp16Mirror] = (),
    *,
    device: int = 0,
) -> float:
    """Median time of a step at the `opt` sizes, queued one by one as the step loop does it.

    Args:
        profiles: by graph input.
        copies: inputs and outputs of the plan beyond the contract.
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
        for name, profile in with_fp16_mirrors(profiles, copies).items():
            accept(context.set_input_shape(name, profile.opt), f"{name}: shape {profile.opt}")
        stream, events = cuda.Stream(), [cuda.Event() for _ in range(_ROUNDS + 1)]
        owned.callback(stream.close)
        for event in events:
            owned.callback(event.close)
        padded = {name for copy in copies for name in (copy.input, copy.output)}
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            itemsize = np.dtype(dtype_name(engine.get_tensor_dtype(name))).itemsize
            shape = tuple(context.get_tensor_shape(name))
            buffer = cuda.DeviceBuffer(math.prod(half_shape(shape) if name in padded else shape) * itemsize)
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
        del context, engine, runtime  # in this order: each needs the next
    return statistics.median(rounds) / _STEPS
