"""`fuse --contract`: a file that another tool changed since its export gets the contract of the original back.

Tools drop the contract, or keep it beside another graph; they rename inputs and outputs, fix sizes, convert types,
leave functions out and take cells apart. What the contract says of pictures, states and their first values still holds.
Sizes, dtypes, cells and errors are those of the changed file, which is compared with the original over 100 steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from stepcell.contract import CellSpec, InitialValue, Parity, StateSpec, StepContract, TensorSpec
from stepcell.dims import resolve, substitute
from stepcell.errors import ExportError, ParityError
from stepcell.exporter.arithmetic import AS_WRITTEN, IN_ONNX_RUNTIME, evaluated_step, holds_float16
from stepcell.exporter.from_onnx.onnx_file import OnnxFile, Port
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.parity import Arrays, Step, file_step, random_clip, smooth_clip
from stepcell.exporter.rounding import CheckedFile, check_rounding
from stepcell.exporter.step_onnx.contract import sizes_for_check
from stepcell.ops import DOMAIN, OPS

__all__ = ["Restored", "cells_of_nodes", "check_restored", "restore_contract"]

_STEPS = 100


@dataclass(frozen=True)
class Restored:
    """The contract of a changed file, its cells as in the original.

    Attributes:
        contract: the states' `original_input` and `original_output` are their names in the file.
        names: name in the contract by name in the file, of every data input and output.
        notes: what has changed, for a person.
    """

    contract: StepContract
    names: Mapping[str, str]
    notes: tuple[str, ...]


def restore_contract(file: OnnxFile, original: StepContract) -> Restored:
    """Fit the contract of the original to a changed file.

    Raises:
        ExportError: the file has other inputs, or lacks the output of a state, or a size contradicts the contract.
    """
    inputs = _matched(file.inputs, original.graph_inputs)
    outputs = _matched(file.outputs, original.graph_outputs)
    foreign = sorted({port.name for port in file.inputs} - {port.name for port in inputs.values()})
    missing = [name for name in original.graph_inputs if name not in inputs]
    missing += [state.output for state in original.states if state.output not in outputs]
    if missing or foreign:
        raise ExportError(
            f"{file.path}: is not the original with changes: its inputs and outputs lack "
            f"{', '.join(missing) or 'nothing'} and have {', '.join(foreign) or 'nothing'} more",
            hint="without --contract it is taken as a file of another program",
        )
    fixed = _fixed_sizes({**original.graph_inputs, **original.graph_outputs}, {**inputs, **outputs}, str(file.path))
    notes = [f"{symbol} is fixed at {size}" for symbol, size in fixed.items()]

    def data(spec: TensorSpec, port: Port) -> TensorSpec:
        return msgspec.structs.replace(spec, shape=substitute(spec.shape, fixed), dtype=_dtype(spec, port, notes))

    def state(spec: StateSpec) -> StateSpec:
        before, after = inputs[spec.input], outputs[spec.output]
        if before.dtype != after.dtype:
            raise ExportError(
                f"{file.path}: state {spec.name}: goes in as {before.dtype} and comes out as {after.dtype}"
            )
        dtype = _dtype(spec, before, notes)
        if dtype == "float16":
            notes.append(f"state {spec.name} is float16, which loses every update smaller than its last bit")
        init = spec.init
        if isinstance(init, InitialValue):
            init = InitialValue.of(init.array().astype(dtype))
        return msgspec.structs.replace(
            spec, shape=substitute(spec.shape, fixed), dtype=dtype, init=init, original_input=before.name,
            original_output=after.name,
        )  # fmt: skip

    kept = [spec for spec in original.outputs if spec.name in outputs]
    notes += [f"output {spec.name} is not in the file any more" for spec in original.outputs if spec not in kept]
    known = {port.name for port in outputs.values()}
    more = [_new_output(port, original) for port in file.outputs if port.name not in known]
    contract = msgspec.structs.replace(
        original,
        precision=file.precision,
        inputs=tuple(data(spec, inputs[spec.name]) for spec in original.inputs),
        outputs=(*(data(spec, outputs[spec.name]) for spec in kept), *more),
        states=tuple(map(state, original.states)),
        example={**original.example, **fixed},
        parity=None,
        graph_sha256=msgspec.UNSET,
    )
    if contract.precision != original.precision:
        notes.append(f"most weights are {contract.precision}, they were {original.precision}")
    names = {port.name: name for ports in (inputs, outputs) for name, port in ports.items()}
    renamed = [f"{theirs} is {ours} again" for theirs, ours in names.items() if theirs != ours]
    return Restored(contract, names, (*renamed, *notes))


def _matched(ports: Sequence[Port], names: Iterable[str]) -> dict[str, Port]:
    """The port of each name: of the same name, else the one that a tool made of it by a prefix or by other characters.

    A prefix is taken only if it is one and the same for all names.
    """
    by_name = {port.name: port for port in ports}
    names = list(names)
    exact = {name: by_name[name] for name in names if name in by_name}
    if len(exact) == len(names):
        return exact
    prefixes = {port.name.removesuffix(names[0]) for port in ports if names and port.name.endswith(names[0])}
    found = [exact]
    found += [{name: by_name[prefix + name] for name in names if prefix + name in by_name} for prefix in prefixes]
    plain = {_plain(port.name): port for port in ports}
    if len(plain) == len(ports):
        found.append({name: plain[_plain(name)] for name in names if _plain(name) in plain})
    return max(found, key=len)


def _plain(name: str) -> str:
    """A name as tools write it that accept letters, digits and underscores only."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def _fixed_sizes(
    specs: Mapping[str, TensorSpec | StateSpec], ports: Mapping[str, Port], subject: str
) -> dict[str, int]:
    """Symbols of the contract that are numbers in the file.

    Raises:
        ExportError: a rank or a number differs from the contract's, or a symbol has two values.
    """
    fixed: dict[str, int] = {}
    for name, spec in specs.items():
        shape = ports[name].shape if name in ports else None
        if shape is None:
            continue
        wrong = ExportError(f"{subject}: {name}: shape {shape} in the file, {spec.shape} in the contract")
        if len(shape) != len(spec.shape):
            raise wrong
        for size, dim in zip(shape, spec.shape, strict=True):
            if not isinstance(size, int):
                continue
            if isinstance(dim, str) and dim.isidentifier() and fixed.setdefault(dim, size) == size:
                continue
            if (isinstance(dim, int) and dim != size) or (isinstance(dim, str) and dim.isidentifier()):
                raise wrong
    return fixed


def _dtype(spec: TensorSpec | StateSpec, port: Port, notes: list[str]) -> str:
    if port.dtype != spec.dtype:
        notes.append(f"{port.name} is {port.dtype}, it was {spec.dtype}")
    return port.dtype


def _new_output(port: Port, original: StepContract) -> TensorSpec:
    known = {*original.symbols}
    if port.shape is None or any(dim is None or (isinstance(dim, str) and dim not in known) for dim in port.shape):
        raise ExportError(
            f"{port.name}: an output that the original does not have, and the file does not give its size",
            hint="without --contract the file is run to find it",
        )
    return TensorSpec(name=port.name, shape=tuple(port.shape), dtype=port.dtype)  # type: ignore[arg-type]


def cells_of_nodes(model: onnx.ModelProto, contract: StepContract) -> tuple[CellSpec, ...] | None:
    """The cells of a file that still has nodes of the ops, one for each node, in the order of the graph.

    A node that a tool renamed with its function (`compose.add_prefix`) gets the op's name back.

    Returns:
        None if there are no such nodes.
    """
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    for node in nodes:
        node.op_type = next((name for name in OPS if node.op_type.endswith(name)), node.op_type)
    if not nodes or any(node.op_type not in OPS for node in nodes):
        return None
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    known = [cell for cell in contract.cells if cell.op]
    return tuple(
        msgspec.structs.replace(_cell(node, weights), name=known[index].name) if len(known) == len(nodes) else
        _cell(node, weights)
        for index, node in enumerate(nodes)
    )  # fmt: skip


def _cell(node: onnx.NodeProto, weights: Mapping[str, tuple[int, ...]]) -> CellSpec:
    op = OPS[node.op_type]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    shape = weights.get(node.input[op.inputs_of(op.variants[-1]).index("W_h")], (0, 0, 1, 1))
    reset = attributes.get("reset", b"").decode()
    return CellSpec(
        name=node.name.rpartition("/")[0].replace("/", ".") or node.output[0],
        op=op.qualified_name,
        hidden=shape[1],
        kernel=(shape[2], shape[3]),
        reset=reset or None,
        gates=attributes["gates"].decode(),
        peephole="w_c" in op.inputs_of("map") and len(node.input) == len(op.inputs_of("map")),
    )


def check_restored(
    original: OnnxSession, before: StepContract, restored: OnnxSession, contract: StepContract, tolerance: float | None
) -> Parity:
    """Compare a changed file with the original over random and smooth frames, at two sizes where sizes are dynamic.

    Args:
        before: the original's contract.
        contract: that of the changed file; inputs and states are converted to the original's dtypes.
        tolerance: relative to max(1, largest value); None: that of the changed file's precision.

    Returns:
        The original's own parity where the changed file gives the same results bit by bit.

    Raises:
        ParityError: the difference is larger.
    """
    clips = []
    for sizes, make in zip(sizes_for_check(contract) * 2, (random_clip, smooth_clip), strict=False):
        shapes = {spec.name: resolve(spec.shape, sizes) for spec in contract.inputs} | contract.state_shapes(sizes)
        clips.append(make(contract, f"sizes {dict(sizes)}", shapes, _STEPS))
    wanted = {name: np.dtype(spec.dtype) for name, spec in before.graph_inputs.items()}
    shared = tuple(spec for spec in contract.outputs if any(spec.name == other.name for other in before.outputs))
    common = msgspec.structs.replace(contract, outputs=shared)

    def converted(feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return original({name: array.astype(wanted[name]) for name, array in feeds.items()})

    def compared(reference: Step, step: Step, subject: str, arithmetic: str) -> Parity:
        file = CheckedFile(restored.data, step, arithmetic, common, lambda: in_float64)
        try:
            return check_rounding(reference, file, clips, subject=subject, tolerance=tolerance)
        except ParityError as error:
            raise ParityError(
                error.message, hint="if the file was quantised or pruned, give what is allowed: --tolerance 0.2"
            ) from error

    reference = file_step(converted, common)
    in_float64 = evaluated_step(original.data, "float64", common, clips[0]) or reference
    parity = compared(reference, file_step(restored, common), "the original file", IN_ONNX_RUNTIME)
    if before.parity is not None and not any(parity.max_abs_error.values()) and _same_types(before, contract):
        return before.parity
    written = evaluated_step(restored.data, "as_written", common, clips[0]) if holds_float16(contract) else None
    if written is not None and in_float64 is not reference:
        parity = compared(in_float64, written, "the original file in float64", AS_WRITTEN)
    return parity


def _same_types(one: StepContract, other: StepContract) -> bool:
    return [s.dtype for s in one.graph_inputs.values()] == [s.dtype for s in other.graph_inputs.values()]
