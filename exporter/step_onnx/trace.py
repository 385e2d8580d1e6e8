"""Tracing of a step model to ONNX with torch's exporter, states as explicit inputs and outputs."""

from __future__ import annotations

import contextlib
import inspect
import io
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import stepcell
from stepcell.contract import StepContract
from stepcell.dims import resolve
from stepcell.errors import ExportError
from stepcell.exporter.quiet import errors_only
from stepcell.exporter.step_onnx.contract import TORCH_DTYPES, example_tensors, sizes_for_check, sizes_for_trace

__all__ = ["onnx_from_module"]

# The step loop is the recurrence: a graph with a loop is not a single step.
_FORBIDDEN = {"Loop", "Scan", "GRU", "LSTM", "RNN"}


def onnx_from_module(model: nn.Module, contract: StepContract, opset: int) -> onnx.ModelProto:
    """Trace `model`, which is in its compute precision already, with the contract's inputs and outputs.

    Raises:
        ExportError: the forward pass fails, cannot be traced, fixes a size the contract leaves
            dynamic, or contains a loop.
    """
    sizes = sizes_for_trace(contract)
    tensors = example_tensors(contract, sizes)
    auto = torch.export.Dim.AUTO  # the tracer finds the relations between sizes
    dynamic = [
        {axis: auto for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in contract.graph_inputs.values()
    ]
    _check_forward(model, contract)
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                tensors,
                dynamo=True,
                opset_version=opset,
                input_names=list(contract.graph_inputs),
                output_names=list(contract.graph_outputs),
                dynamic_shapes=_like_signature(model, dynamic) if any(dynamic) else None,
                verbose=False,
            )
    except Exception as error:  # any exception of any pass
        raise _tracing_error(error) from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    _check_graph(proto, contract)
    return proto


def _tracing_error(error: BaseException) -> ExportError:
    """What stopped the tracer, and where in the user's code."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for each in chain:
        if isinstance(each, GuardOnDataDependentSymNode):
            return ExportError(
                f"tracing failed: {_place(each)}forward chooses by the value of a tensor (`if`, `while`, bool(), "
                "item()), and a file holds one way",
                hint="compute both ways and select: h = torch.where(x.mean() > 0, cell(x, h), h)",
            )
    cause = error.__cause__ or error
    return ExportError(
        f"tracing failed: {_place(cause)}{type(cause).__name__}: {_first_line(cause)}",
        hint="forward must consist of torch operations on its inputs and states",
    )


def _place(error: BaseException) -> str:
    """The innermost line of code outside torch and stepcell that an error passed, as `net.py, line 12: `."""
    own = Path(stepcell.__file__).resolve().parent
    libraries = Path(torch.__file__).resolve().parents[1]
    skipped = (
        *(libraries / name for name in ("torch", "sympy", "onnxscript")),
        own,
        own.parent / "exporter",
        own.parent / "models",
    )
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).resolve()
        if file.is_file() and not any(file.is_relative_to(folder) for folder in skipped):
            return f"{file.name}, line {frame.lineno}: "
    return ""


def _like_signature(model: nn.Module, per_tensor: list[dict[int, Any]]) -> tuple[Any, ...]:
    """Group entries per tensor as torch expects them: a `*states` parameter takes one tuple."""
    for index, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return (*per_tensor[:index], tuple(per_tensor[index:]))
    return tuple(per_tensor)


def _check_forward(model: nn.Module, contract: StepContract) -> None:
    """One forward pass, at small sizes: torch has no fast convolutions in float16 on most CPUs."""
    sizes = sizes_for_check(contract)[0]
    try:
        with torch.no_grad():
            results = model(*example_tensors(contract, sizes))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        hint = None
        if contract.precision == "float16":
            hint = "in float16 the states stay float32: the module may need to cast them, or try --precision float32"
        raise ExportError(f"forward failed in {contract.precision}: {_first_line(error)}", hint=hint) from error
    specs = list(contract.graph_outputs.values())
    if not isinstance(results, tuple) or len(results) != len(specs):
        got = f"{len(results)} values" if isinstance(results, tuple) else type(results).__name__
        names = ", ".join(spec.name for spec in specs)
        raise ExportError(f"forward: expected a tuple of {len(specs)} ({names}), got {got}")
    for spec, result in zip(specs, results, strict=True):
        shape, dtype = resolve(spec.shape, sizes), TORCH_DTYPES[spec.dtype]
        if tuple(result.shape) != shape or result.dtype != dtype:
            raise ExportError(
                f"forward: {spec.name}: expected {shape} {dtype}, got {tuple(result.shape)} {result.dtype}",
                hint="the specs of the module and its forward pass disagree",
            )


def _check_graph(proto: onnx.ModelProto, contract: StepContract) -> None:
    for node in proto.graph.node:
        if node.op_type in _FORBIDDEN:
            raise ExportError(f"node {node.name}: {node.op_type} loops inside the step; write the module as one step")
    inputs = {value.name: value for value in proto.graph.input}
    for name, spec in contract.graph_inputs.items():
        if name not in inputs:
            raise ExportError(f"input {name}: has no effect on any output", hint="remove it from the specs")
        for dim, traced in zip(spec.shape, inputs[name].type.tensor_type.shape.dim, strict=True):
            if isinstance(dim, str) and not traced.dim_param:
                raise ExportError(
                    f"input {name}: {dim} should be dynamic, but the module fixes it at {traced.dim_value}",
                    hint="export with --shape and without --dynamic for it",
                )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from printing its progress and unrelated warnings."""
    loggers = ("torch.onnx", "torch.fx.experimental.symbolic_shapes", "torch._dynamo", "torch.export")
    # the tracer also prints the graph of a failed attempt
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with errors_only(*loggers), warnings.catch_warnings(), silent[0], silent[1]:
        warnings.simplefilter("ignore")
        yield
