"""Contract of a fused file, and its graph with the names and sizes of the contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec
import onnx
from onnxscript import ir

from stepcell.contract import DType, StateSpec, StepContract, TensorSpec
from stepcell.dims import Dim, substitute
from stepcell.exporter.cell_recognition.cell import NearMiss, RecognisedCell
from stepcell.exporter.from_onnx.input_values import Number
from stepcell.exporter.from_onnx.onnx_file import OnnxFile, Port
from stepcell.exporter.from_onnx.pairs import Pair
from stepcell.exporter.from_onnx.sizes import Sizes
from stepcell.exporter.from_onnx.stream_axis import StreamAxes
from stepcell.exporter.step_onnx.graph import separate_outputs, set_shape
from stepcell.pixels import completed, map_layout, natural_layout

__all__ = ["FAMILY", "contract_of", "rename"]

FAMILY = "adopted"


def contract_of(
    file: OnnxFile,
    pairs: Sequence[Pair],
    sizes: Sizes,
    streams: StreamAxes,
    values: Mapping[str, tuple[Number, ...]],
    cells: Sequence[RecognisedCell],
    near_misses: Sequence[NearMiss],
    source: Mapping[str, object],
) -> StepContract:
    """The contract of the fused file; `parity` is added after the comparison."""
    ends = {end for pair in pairs for end in (pair.input, pair.output)}
    dtypes = {port.name: port.dtype for port in file.inputs}
    ones = dict.fromkeys(streams.only_one, 1)

    def tensors(ports: Sequence[Port], others: Sequence[TensorSpec] = ()) -> Iterator[TensorSpec]:
        for port in ports:
            if port.name not in ends:
                spec = _tensor(port.name, port.dtype, substitute(sizes.shapes[port.name], ones), others)
                axis = streams.axes[port.name] if pairs else msgspec.UNSET
                value = values.get(port.name, msgspec.UNSET)
                yield msgspec.structs.replace(spec, batch_axis=axis, value=value)

    inputs = tuple(tensors(file.inputs))
    return StepContract(
        family=FAMILY,
        precision=file.precision,
        inputs=inputs,
        outputs=tuple(tensors(file.outputs, inputs)),
        states=tuple(
            StateSpec(
                name=pair.name,
                shape=substitute(sizes.shapes[pair.input], ones),
                dtype=dtypes[pair.input],
                batch_axis=streams.axes[pair.input],
                original_input=pair.input,
                original_output=pair.output,
            )
            for pair in pairs
        ),
        cells=(*(cell.spec for cell in cells), *(miss.spec for miss in near_misses)),
        example={symbol: size for symbol, size in sizes.example.items() if symbol not in ones},
        source=dict(source),
    )


def _tensor(name: str, dtype: DType, shape: Sequence[Dim], inputs: Sequence[TensorSpec]) -> TensorSpec:
    layout = natural_layout(shape) or map_layout(shape, inputs)
    return completed(TensorSpec(name=name, shape=tuple(shape), dtype=dtype, layout=layout))


def rename(
    model: ir.Model, file: OnnxFile, contract: StepContract, data: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """The graph with states named `state_in.X` and `state_out.X`, data inputs first, sizes as in the contract.

    Args:
        data: new names of data inputs and outputs.
    """
    graph = model.graph
    separate_outputs(graph, [port.name for port in file.outputs])
    inputs = {**(data or {}), **{str(state.original_input): state.input for state in contract.states}}
    outputs = {**(data or {}), **{str(state.original_output): state.output for state in contract.states}}
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value in values:
            value.name = names.get(str(value.name), value.name)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # they hold the old names of sizes; readers infer them again
    for ports, specs in ((proto.graph.input, contract.graph_inputs), (proto.graph.output, contract.graph_outputs)):
        by_name = {port.name: port for port in ports}
        ordered = [by_name[name] for name in specs]
        for port, spec in zip(ordered, specs.values(), strict=True):
            set_shape(port, spec.shape)
        copies = [onnx.ValueInfoProto.FromString(port.SerializeToString()) for port in ordered]
        del ports[:]
        ports.extend(copies)
    return proto
