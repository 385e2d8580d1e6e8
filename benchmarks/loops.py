"""Loops that benchmarks/loop.py compares: functions that take the inputs of a step, return its first output and keep
the states.

Inputs and outputs are numpy arrays, as from a decoder and for an encoder. All loops have the same float32 weights and
the same number of threads.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import torch
import torch.nn.functional as F
from loop_cases import Case
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stepcell import StepLoop, quantize
from stepcell.models import CellStack, ConvGRUCell
from stepcell.models.step import initial_states

__all__ = ["BASELINE", "FLOOR", "LOOPS", "OURS", "TOLERANCES", "UNCHECKED", "Loop", "matrix_product", "reference"]

Array: TypeAlias = NDArray[Any]
Loop: TypeAlias = Callable[..., Array]


def step_loop(case: Case, *, check_finite: bool = True, backend: str = "onnxruntime") -> Loop:
    """StepLoop: every state has two buffers, used alternately.

    Args:
        check_finite: check frames for NaN, the default of StepLoop; no other loop does.
        backend: what computes a step.

    Raises:
        RuntimeError: ncnn is not installed.
    """
    if backend == "ncnn" and find_spec("ncnn") is None:
        raise RuntimeError("ncnn is not installed")
    loop = StepLoop.open(case.exported, threads=case.threads, check_finite=check_finite, backend=backend)
    names = [spec.name for spec in loop.contract.inputs]
    return lambda *x: loop.step(**dict(zip(names, x, strict=True)))["y"]


def int8(case: Case) -> Loop:
    """StepLoop with the file that `stepcell quantize` writes: another result, judged by benchmarks/int8.py."""
    path = case.exported.with_name(f"{case.exported.stem}.int8.onnx")
    names = [spec.name for spec in case.module.inputs]
    if not path.exists():
        rng = np.random.default_rng(2)
        frames = [
            {name: rng.random(shape, np.float32) for name, shape in zip(names, case.shapes, strict=True)}
            for _ in range(8)
        ]
        quantize(case.exported, path, [frames], max_loss=math.inf)
    loop = StepLoop.open(path, threads=case.threads, backend="onnxruntime")
    return lambda *x: loop.step(**dict(zip(names, x, strict=True)))[loop.contract.outputs[0].name]


def session_run(case: Case, *, spinning: bool = True) -> Loop:
    """The simplest loop: the state is returned as a numpy array and passed in again.

    Args:
        spinning: idle threads spin, the default of ONNX Runtime; False: they sleep.
    """
    session, states = _session(case, spinning=spinning), _zero_states(case)
    inputs, states_in, _ = _names(case)

    def step(*x: Array) -> Array:
        nonlocal states
        y, *rest = session.run(None, dict(zip((*inputs, *states_in), (*x, *states), strict=True)))
        states = rest[len(rest) - len(states) :]
        return y  # type: ignore[no-any-return]

    return step


def io_binding(case: Case) -> Loop:
    """The loop in documentation/inference.md of RobustVideoMatting: outputs bound once, the states passed on
    as OrtValues.

    From the second step on, ONNX Runtime 1.31.1 writes a new state over the one it reads. This is correct only for a
    graph that writes a state after all nodes that read it, as the graphs here do.
    """
    session = _session(case)
    inputs, states_in, outputs = _names(case)
    binding = session.io_binding()
    for name in outputs:
        binding.bind_output(name, "cpu")
    states = [onnxruntime.OrtValue.ortvalue_from_numpy(state) for state in _zero_states(case)]

    def step(*x: Array) -> Array:
        nonlocal states
        for name, array in zip(inputs, x, strict=True):
            binding.bind_cpu_input(name, array)
        for name, state in zip(states_in, states, strict=True):
            binding.bind_ortvalue_input(name, state)
        session.run_with_iobinding(binding)
        y, *rest = binding.get_outputs()
        states = rest[len(rest) - len(states) :]
        return y.numpy()  # type: ignore[no-any-return]

    return step


def openvino(case: Case, precision: str) -> Loop:
    """OpenVINO, compiled for these sizes; two requests in turn, so that a state that is read is not written to.

    Args:
        precision: of the arithmetic, "f32" or "bf16".

    Raises:
        RuntimeError: OpenVINO is not installed.
    """
    try:
        import openvino as ov
    except ImportError as problem:
        raise RuntimeError("OpenVINO is not installed") from problem
    core, states = ov.Core(), _zero_states(case)
    inputs, states_in, _ = _names(case)
    # OpenVINO does not know functions of the file.
    flat = onnx.inliner.inline_local_functions(onnx.load(str(case.wide)))
    model = core.read_model(flat.SerializeToString(), b"")
    model.reshape(dict(zip((*inputs, *states_in), (*case.shapes, *(state.shape for state in states)), strict=True)))
    options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", options | {"INFERENCE_NUM_THREADS": case.threads})
    requests = itertools.cycle([compiled.create_infer_request() for _ in range(2)])

    def step(*x: Array) -> Array:
        nonlocal states
        given = dict(zip((*inputs, *states_in), (*x, *states), strict=True))
        found = next(requests).infer(given, share_inputs=True, share_outputs=True)
        outputs = [found[i] for i in range(len(found))]
        states = outputs[len(outputs) - len(states) :]
        return outputs[0].copy()

    return step


def eager(case: Case, *, memory_format: torch.memory_format = torch.contiguous_format) -> Loop:
    """The torch module without gradients."""
    module = copy.deepcopy(case.module).to(memory_format=memory_format)
    return _torch_loop(case, module, memory_format)


def compiled(case: Case) -> Loop:
    """The module with torch.compile. The first step compiles it, which takes about half a minute."""
    from torch._inductor import config  # takes a second to import

    config.compile_threads = 1  # starting workers takes longer than it saves
    return _torch_loop(case, torch.compile(copy.deepcopy(case.module), dynamic=False))


def seed(case: Case, form: Callable[[ConvGRUCell], nn.Module]) -> Loop:
    """The module with its cell computed as in pytorch-convgru-cell.

    Raises:
        RuntimeError: the module has other cells than one ConvGRU.
    """
    if isinstance(case.module, CellStack):
        cell = case.module.cells[0]
        assert isinstance(cell, ConvGRUCell)
        return _torch_loop(case, form(cell))
    module: Any = copy.deepcopy(case.module)
    if not isinstance(getattr(module, "cell", None), ConvGRUCell):
        raise RuntimeError("for models with one ConvGRU")
    module.cell = form(module.cell)
    return _torch_loop(case, module)


class SixConvolutions(nn.Module):
    """One convolution per weight, as in the reference layer of pytorch-convgru-cell (which has no bias)."""

    def __init__(self, cell: ConvGRUCell) -> None:
        super().__init__()
        self.w, self.b = cell.weight_x.chunk(3), cell.bias.chunk(3)
        self.u = (*cell.weight_h.chunk(2), cell.weight_n)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        (w_z, w_r, w_n), (b_z, b_r, b_n), (u_z, u_r, u_n) = self.w, self.b, self.u
        z = torch.sigmoid(_same(x, w_z, b_z) + _same(h, u_z))
        r = torch.sigmoid(_same(x, w_r, b_r) + _same(h, u_r))
        n = torch.tanh(_same(x, w_n, b_n) + _same(r * h, u_n))
        h = (1 - z) * h + z * n
        return h, h


class ThreeConvolutions(nn.Module):
    """Weights of the same operand in one convolution, as in the C++ extension of pytorch-convgru-cell."""

    def __init__(self, cell: ConvGRUCell) -> None:
        super().__init__()
        self.w, self.b, self.u, self.u_n = cell.weight_x, cell.bias, cell.weight_h, cell.weight_n

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        a_z, a_r, a_n = _same(x, self.w, self.b).chunk(3, dim=1)
        g_z, g_r = _same(h, self.u).chunk(2, dim=1)
        z, r = torch.sigmoid(a_z + g_z), torch.sigmoid(a_r + g_r)
        n = torch.tanh(a_n + _same(r * h, self.u_n))
        h = (1 - z) * h + z * n
        return h, h


def reference(case: Case) -> Loop:
    """The module in float64, the reference for all loops."""
    return _torch_loop(case, copy.deepcopy(case.module).double(), dtype=torch.float64)


def matrix_product(case: Case) -> Loop:
    """Not a step: a matrix product in torch with as many multiplications as the convolutions of the module.

    It runs at the best rate of the processor. A direct convolution cannot be much faster; algorithms with fewer
    multiplications, such as Winograd's, could be.
    """
    zeros = [torch.zeros(shape) for shape in case.shapes]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        case.module(*zeros, *initial_states(case.module, *zeros))
    rows = max(1, round(counter.get_total_flops() / (2 * WIDE * WIDE)))
    left, right = torch.rand(rows, WIDE), torch.rand(WIDE, WIDE)

    @torch.inference_mode()
    def product(*_: Array) -> Array:
        return torch.mm(left, right).numpy()  # type: ignore[no-any-return]

    return product


OURS, UNCHECKED, BASELINE = "StepLoop", "StepLoop, check_finite=False", "session.run"
INT8 = "StepLoop, int8"
FLOOR = "a matrix product of as many operations"
WIDE = 512  # size of its square factor: large enough for the best rate, small enough for the cache
LOOPS: dict[str, Callable[[Case], Loop]] = {
    OURS: step_loop,
    UNCHECKED: partial(step_loop, check_finite=False),
    "StepLoop, ncnn": partial(step_loop, backend="ncnn"),
    INT8: int8,
    BASELINE: session_run,
    "session.run, no spinning": partial(session_run, spinning=False),
    "IO binding": io_binding,
    "OpenVINO, float32": partial(openvino, precision="f32"),
    "OpenVINO, bfloat16": partial(openvino, precision="bf16"),
    "torch eager": eager,
    "torch eager, channels last": partial(eager, memory_format=torch.channels_last),
    "torch.compile": compiled,
    "torch, six convolutions": partial(seed, form=SixConvolutions),
    "torch, three convolutions": partial(seed, form=ThreeConvolutions),
}
TOLERANCES = {"OpenVINO, bfloat16": 0.1, INT8: 1.0}  # largest difference to float64, where it is not that of float32


def _session(case: Case, *, spinning: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    return onnxruntime.InferenceSession(str(case.wide), options, providers=["CPUExecutionProvider"])


def _names(case: Case) -> tuple[list[str], list[str], list[str]]:
    """Names of inputs, of states as inputs, and of all outputs, the states at the end."""
    states = [state.name for state in case.module.states]
    outputs = [spec.name for spec in case.module.outputs]
    return (
        [spec.name for spec in case.module.inputs],
        [f"state_in.{name}" for name in states],
        [*outputs, *(f"state_out.{name}" for name in states)],
    )


def _zero_states(case: Case) -> list[Array]:
    return [state.numpy() for state in initial_states(case.module, *(torch.zeros(shape) for shape in case.shapes))]


def _torch_loop(
    case: Case,
    module: Callable[..., Any],
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
) -> Loop:
    states = initial_states(case.module, *(torch.zeros(shape) for shape in case.shapes), dtype=dtype)

    @torch.inference_mode()
    def step(*x: Array) -> Array:
        nonlocal states
        tensors = [torch.from_numpy(array).to(dtype).contiguous(memory_format=memory_format) for array in x]
        y, *rest = module(*tensors, *states)
        states = tuple(rest[len(rest) - len(states) :])
        return y.numpy()  # type: ignore[no-any-return]

    return step


def _same(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding="same")
