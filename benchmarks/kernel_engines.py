"""The step as an exported file in ONNX Runtime, TensorRT and TensorRT-RTX.

The file is what `stepcell export` writes for the cell: a node with its definition as a function of standard operators.
States are bound on the device, in two buffers that are swapped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from kernel_cases import Case, Problem, States, Weights
from kernel_timing import CHAIN, Runs, runs_of
from torch import Tensor, nn

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import DeviceError
from stepcell.models import ConvGRUCell, ConvLSTMCell
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.engine_check import check_engine, register_plugins
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.engine.tensorrt_module import load_tensorrt

__all__ = ["exported", "onnx_runtime", "tensorrt"]

StateDtype = Literal["float16", "float32"]


class _CellsInTurn(nn.Module):
    """The cells of a case as a step model."""

    def __init__(self, case: Case, weights: Sequence[Weights]) -> None:
        super().__init__()
        cells: list[nn.Module] = []
        for cell, own in zip(case.cells, weights, strict=True):
            names = {"weight_x": "W_x", "bias": "b", "weight_h": "W_h", "weight_n": "W_n", "bias_n": "b_hn"}
            if cell.op == "ConvGRU":
                reset: Any = cell.variant
                made: nn.Module = ConvGRUCell(cell.inputs, cell.hidden, cell.kernel, reset=reset)
            else:
                made = ConvLSTMCell(cell.inputs, cell.hidden, cell.kernel)
            made.load_state_dict({ours: own[op].float().cpu() for ours, op in names.items() if op in own})
            cells.append(made)
        self.cells, first = nn.ModuleList(cells), case.cells[0]
        shape = ("batch", first.hidden, "height", "width")
        self.inputs = [TensorSpec(name="x", shape=("batch", first.inputs, "height", "width"), layout="NCHW")]
        self.outputs = [TensorSpec(name="y", shape=shape, layout="NCHW")]
        self.states = [StateSpec(name=name, shape=shape) for name in "hc"[: case.state_count]]

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        y = x
        for cell in self.cells:
            y, *new = cell(x, *states)
            states = tuple(new)
        return y, *states


def exported(problem: Problem, state: StateDtype, path: Path) -> StepContract:
    """Write the case as a float16 ONNX file for any batch and map; returns its contract."""
    from stepcell.exporter import export_onnx  # needs onnx, the other contenders do not

    first = problem.case.cells[0]
    return export_onnx(
        _CellsInTurn(problem.case, problem.weights),
        path,
        state_dtype=state,
        shapes={"x": (1, first.inputs, 8, 8)},  # small: the export compares the file with the module on the CPU
        dynamic=("batch", "height", "width"),
    )


def onnx_runtime(problem: Problem, *, nhwc: bool = False) -> Runs:
    """ONNX Runtime with float16 states; on CUDA with one CUDA graph per parity of the step.

    Args:
        nhwc: allow channels-last convolutions.

    Raises:
        DeviceError: this ONNX Runtime has no CUDA provider.
    """
    import onnxruntime as ort

    on_cuda = problem.device.type == "cuda"
    if on_cuda and "CUDAExecutionProvider" not in ort.get_available_providers():
        raise DeviceError(f"ONNX Runtime {ort.__version__} was built without CUDA", hint="install onnxruntime-gpu")
    stream = torch.cuda.Stream() if on_cuda else None
    with tempfile.TemporaryDirectory() as folder:
        contract = exported(problem, "float16", Path(folder) / "step.onnx")
        session = ort.InferenceSession(str(Path(folder) / "step.onnx"), providers=_providers(stream, nhwc=nhwc))
    if on_cuda and session.get_providers()[0] != "CUDAExecutionProvider":
        raise DeviceError("ONNX Runtime did not load its CUDA provider", hint="see its messages above")
    bound = _Bound(ort, session, contract, problem)

    def check() -> States:
        for way in (1, 0, 1, 0, 1, 0):  # the first runs capture, each direction separately
            for tensor, start in zip(bound.banks[way], problem.states, strict=True):
                tensor.copy_(start)
            if on_cuda:
                torch.cuda.synchronize()
            bound.run(way)
            if on_cuda:
                torch.cuda.synchronize()
        return bound.banks[1]

    def chain() -> None:
        for step in range(CHAIN):
            bound.run(step % 2)

    return Runs(check, lambda: bound.run(0), chain, stream=stream, notes=(f"ONNX Runtime {ort.__version__}",))


class _Bound:
    """A session with its tensors: two banks of states; `way` says which one is read."""

    def __init__(self, ort: Any, session: Any, contract: StepContract, problem: Problem) -> None:
        self._session, self._device = session, problem.device.type
        self.banks = [tuple(state.contiguous().clone() for state in problem.states) for _ in range(2)]
        # Keep the tensors alive: a binding has only their addresses.
        self._xs = [x.contiguous().clone() for x in problem.xs[:2]]
        self._y = torch.empty_like(self.banks[0][0])
        self._bindings, self._options = [], []
        for way in range(2):
            binding = session.io_binding()
            inputs = {"x": self._xs[way]}
            inputs |= {spec.input: tensor for spec, tensor in zip(contract.states, self.banks[way], strict=True)}
            outputs = {"y": self._y}
            outputs |= {spec.output: tensor for spec, tensor in zip(contract.states, self.banks[1 - way], strict=True)}
            for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
                for name, tensor in tensors.items():
                    bind(name, self._device, 0, np.float16, tuple(tensor.shape), tensor.data_ptr())
            options = ort.RunOptions()
            if self._device == "cuda":
                options.add_run_config_entry("gpu_graph_id", str(way + 1))
                # run() does not wait on the host; the time is taken by the events around it.
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._bindings.append(binding)
            self._options.append(options)

    def run(self, way: int) -> None:
        """Queue a step from bank `way` to the other one."""
        self._session.run_with_iobinding(self._bindings[way], self._options[way])


def _providers(stream: Any, *, nhwc: bool) -> list[Any]:
    if stream is None:
        return ["CPUExecutionProvider"]
    options = {
        "device_id": "0",
        "enable_cuda_graph": "1",
        "use_tf32": "0",
        "user_compute_stream": str(stream.cuda_stream),
        "prefer_nhwc": str(int(nhwc)),
    }
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


def tensorrt(
    problem: Problem,
    state: StateDtype,
    kernels: Path,
    *,
    flavor: Literal["tensorrt", "tensorrt-rtx"] = "tensorrt",
    plugin: Literal["on", "off"] = "off",
) -> Runs:
    """An engine as `stepcell build` makes it, for exactly this size, with one CUDA graph per chain.

    The states are followed by the fp16 mirrors that an engine with the plugin has.

    Args:
        kernels: folder of compiled kernels, for the plugin.

    Raises:
        StepcellError: TensorRT is not installed, or does not build or load the engine here.
    """
    load_tensorrt(flavor)  # fails early, before the export
    case, first = problem.case, problem.case.cells[0]
    sizes: dict[str, tuple[int, ...]] = {"x": (case.batch, first.inputs, case.height, case.width)}
    options = BuildOptions(
        flavor=flavor, plugin=plugin, kernels=str(kernels), min_shapes=sizes, opt_shapes=sizes, max_shapes=sizes
    )
    with tempfile.TemporaryDirectory() as folder:
        onnx, plan = Path(folder) / "step.onnx", Path(folder) / "step.engine"
        contract = exported(problem, state, onnx)
        build_engine(onnx, plan, options)
        checked = check_engine(plan, device=0)
    register_plugins(checked)
    trt: Any = checked.tensorrt.module
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(checked.plan)
    context = engine and engine.create_execution_context()
    if not context:
        raise DeviceError(f"{checked.tensorrt.name} does not load its engine on this device")
    xs = [x.contiguous() for x in problem.xs]
    copies, names = checked.sidecar.fp16_mirrors, [spec.name for spec in contract.states]
    ends = [(each.input, each.output) for each in (*contract.states, *copies)]
    wide = [s.to(getattr(torch, state)).contiguous() for s in problem.states]
    states = (*wide, *(problem.states[names.index(each.state)] for each in copies))  # channels last, as kHWC8
    for name, tensor in (("x", xs[0]), *zip((each for each, _ in ends), states, strict=True)):
        context.set_input_shape(name, tuple(tensor.shape))

    def step(x: Tensor, old: States) -> States:
        new, y = tuple(torch.empty_like(s) for s in old), torch.empty_like(old[0], dtype=torch.float16)
        tensors = {"x": x, "y": y}
        for (before, after), tensor, result in zip(ends, old, new, strict=True):
            tensors |= {before: tensor, after: result}
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise DeviceError(f"{checked.tensorrt.name} refused the step")
        return new

    notes = (f"{checked.tensorrt.name} {checked.tensorrt.version}", f"{checked.sidecar.compute_layers} compute layers")
    return runs_of(step, xs, states, notes=notes)
