"""Completion of a traced graph: names, symbolic sizes, op functions, contract."""

from __future__ import annotations

import ast
import dataclasses
from collections import Counter
from collections.abc import Sequence

import msgspec
import onnx
import onnx.inliner
from onnxscript import ir

from stepcell import __version__
from stepcell.contract import METADATA_KEY, StepContract
from stepcell.dims import Dim
from stepcell.exporter.step_onnx.op_functions import DOMAIN, Variant, function_for, variant_of
from stepcell.graph_hash import graph_sha256

__all__ = ["attach_functions", "embed_contract", "separate_outputs", "set_shape", "tidy"]

_INLINED = "a file holds one variant of an op, and another one is more frequent"


def tidy(model: onnx.ModelProto, contract: StepContract) -> None:
    """Name nodes by module path and sizes by the contract's symbols; remove the tracer's metadata.

    The metadata has stack traces with paths of the exporting machine.
    """
    _name_nodes(model.graph)
    for holder in (model, model.graph, *model.graph.node, *_values(model.graph), *model.graph.initializer):
        del holder.metadata_props[:]
    del model.graph.value_info[:]  # they hold the tracer's symbols; readers infer them again
    specs = {**contract.graph_inputs, **contract.graph_outputs}
    for value in _values(model.graph):
        set_shape(value, specs[value.name].shape)
    model.graph.name = contract.family
    model.producer_name, model.producer_version = DOMAIN, __version__


def attach_functions(model: onnx.ModelProto, contract: StepContract) -> StepContract:
    """Append the definition of every stepcell op in the graph.

    A file can hold one variant of an op (see `op_functions`); nodes of other, rarer variants are
    inlined, and the returned contract lists their cells without an op.
    """
    opset = next(item.version for item in model.opset_import if item.domain == "")
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    counts = Counter(variant_of(node) for node in nodes)
    kept: dict[str, Variant] = {}
    for variant, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        kept.setdefault(variant.op, variant)

    inlined = []
    for node in nodes:
        variant = variant_of(node)
        if variant != kept[variant.op]:
            inlined.append(node.name.rpartition("/")[0])
            node.op_type = "_".join(map(str, dataclasses.astuple(variant)))  # temporary, until it is inlined
            function = function_for(variant, opset)
            function.name = node.op_type
            if all(function.name != other.name for other in model.functions):
                model.functions.append(function)
    if inlined:
        flat = onnx.inliner.inline_selected_functions(model, [(DOMAIN, f.name) for f in model.functions])
        model.CopyFrom(flat)
        del model.functions[:]
    model.functions.extend(function_for(variant, opset) for variant in kept.values())
    cells = tuple(
        msgspec.structs.replace(cell, op=None, reason=_INLINED) if cell.name.replace(".", "/") in inlined else cell
        for cell in contract.cells
    )
    return msgspec.structs.replace(contract, cells=cells)


def embed_contract(model: onnx.ModelProto, contract: StepContract) -> StepContract:
    """Write the contract into the file's metadata with the hash of the graph, replacing one that is there."""
    contract = msgspec.structs.replace(contract, graph_sha256=graph_sha256(model))
    others = {entry.key: entry.value for entry in model.metadata_props if entry.key != METADATA_KEY}
    onnx.helper.set_model_props(model, {METADATA_KEY: contract.to_sealed_json(), **others})
    return contract


def _values(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [*graph.input, *graph.output]


def _name_nodes(graph: onnx.GraphProto) -> None:
    used: Counter[str] = Counter()
    for node in graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), None)
        try:
            path = [str(scope) for scope in ast.literal_eval(scopes or "[]")][:-1]
        except (ValueError, SyntaxError):
            path = []
        # a node that replaced a cell has no scopes, but a name
        scope = node.name.rpartition("/")[0] if scopes is None else path[-1].replace(".", "/") if path else ""
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"
        node.doc_string = ""


def separate_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Give every output a separate value: one value cannot have two names."""
    seen: set[int] = set()
    for index, (value, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        if value.is_graph_input() or value.is_initializer() or id(value) in seen:
            if value.is_initializer():
                value.name = f"{name}.constant"
            copy = ir.node("Identity", inputs=[value], name=f"{name}/Identity")
            copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = name, value.type, value.shape
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
        seen.add(id(value))


def set_shape(value: onnx.ValueInfoProto, shape: Sequence[Dim | None]) -> None:
    """Write a shape of numbers and symbols into an input or output of a graph; None: a dynamic size without a name."""
    value.type.tensor_type.ClearField("shape")
    value.type.tensor_type.shape.SetInParent()
    for size in shape:
        dim = value.type.tensor_type.shape.dim.add()
        if isinstance(size, int):
            dim.dim_value = size
        elif size is not None:
            dim.dim_param = size
