"""The floor of a step's time: its bytes over the measured bandwidth, its operations over the measured rate.

Weights, inputs and states are read once and outputs and states written once; only convolutions and matrix products
count as operations, two for each multiplication. The larger of the two times is the floor of a direct computation.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.dims import resolve
from stepcell.onnx_model import read_model
from stepcell.runtime.evaluate import program_of

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Floor", "Machine", "Work", "floor", "measure_machine", "work_of"]

_COPY = 64 << 20  # bytes of the array that is copied: beyond every cache
_WIDE = 1024  # size of the matrices that are multiplied
_REPEATS = 7


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What one step has to do, at given sizes.

    Attributes:
        operations: operations of convolutions and matrix products, two a multiplication.
        bytes: bytes of weights, data inputs and outputs, and every state twice.
    """

    operations: int
    bytes: int


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What the processor does at best.

    Attributes:
        bytes_per_second: read and written by a copy of a large array.
        operations_per_second: rate of a float32 matrix product in ONNX Runtime.
        threads: it was measured with; None: ONNX Runtime's default.
    """

    bytes_per_second: float
    operations_per_second: float
    threads: int | None


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """The shortest time of a step, in milliseconds, by what limits it."""

    memory_ms: float
    compute_ms: float

    @property
    def milliseconds(self) -> float:
        """The larger one."""
        return max(self.memory_ms, self.compute_ms)


def work_of(path: Path, contract: StepContract, symbols: Mapping[str, int]) -> Work:
    """Count the work of a step of an ONNX file, its functions inlined.

    Args:
        contract: as the model runs here: it says how wide inputs, outputs and states are.
        symbols: a value for each.
    """
    _, model = read_model(path)
    width = 2 if contract.precision == "float16" else 4
    moved = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer) * width
    for spec in (*contract.inputs, *contract.outputs):
        moved += int(np.prod(resolve(spec.shape, symbols))) * np.dtype(spec.dtype).itemsize
    for state in contract.states:
        moved += 2 * int(np.prod(resolve(state.shape, symbols))) * np.dtype(state.dtype).itemsize
    feeds = {name: np.zeros(resolve(spec.shape, symbols), spec.dtype) for name, spec in contract.graph_inputs.items()}
    return Work(operations=_operations(model, feeds), bytes=moved)


def measure_machine(threads: int | None) -> Machine:
    """Copy a large array and multiply two matrices, each a few times; the best rate counts."""
    import onnxruntime
    from onnx import TensorProto, helper

    source = np.ones(_COPY // 4, np.float32)
    target = np.empty_like(source)
    copies = _timed(lambda: np.copyto(target, source))
    shape = [_WIDE, _WIDE]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", ends[:2], ends[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left, right = np.random.default_rng(0).random((2, _WIDE, _WIDE), np.float32)
    products = _timed(lambda: session.run(None, {"a": left, "b": right}))
    return Machine(bytes_per_second=2 * _COPY / copies, operations_per_second=2 * _WIDE**3 / products, threads=threads)


def floor(work: Work, machine: Machine) -> Floor:
    """The time that the work takes at best."""
    return Floor(
        memory_ms=work.bytes / machine.bytes_per_second * 1e3,
        compute_ms=work.operations / machine.operations_per_second * 1e3,
    )


def _operations(model: ModelProto, feeds: Mapping[str, NDArray[Any]]) -> int:
    """Run a step, and look at the shapes of what the convolutions and products read and write."""
    from onnx import helper, inliner

    if model.functions:
        model = inliner.inline_local_functions(model)
    nodes = [node for node in model.graph.node if node.op_type in _COUNTS]
    names = {name for node in nodes for name in (*node.input[:2], node.output[0])}
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in sorted(names))
    shapes = {name: np.shape(value) for name, value in program_of(model, "float32").run(feeds).items()}
    multiplications: int = sum(
        _COUNTS[node.op_type]([shapes[name] for name in node.input[:2]], shapes[node.output[0]]) for node in nodes
    )
    return 2 * multiplications


def _convolution(inputs: Sequence[Sequence[int]], output: Sequence[int]) -> int:
    # weights (M, C / groups, k...): each output element takes C / groups * k multiplications
    return int(np.prod(output)) * int(np.prod(inputs[1][1:]))


def _transposed(inputs: Sequence[Sequence[int]], _: Sequence[int]) -> int:
    # weights (C, M / groups, k...): each input element goes into M / groups * k outputs
    return int(np.prod(inputs[0])) * int(np.prod(inputs[1][1:]))


def _product(inputs: Sequence[Sequence[int]], output: Sequence[int]) -> int:
    return int(np.prod(output)) * int(inputs[0][-1])


_COUNTS: dict[str, Any] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "MatMul": _product,
    "Gemm": _product,
}


def _timed(call: Any) -> float:
    call()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)  # the best rate: what else the machine does makes it slower, nothing makes it faster
