"""`export --plain`: the graph for other runtimes, in standard operators that they all have.

OpenVINO, tract, TVM, IREE, ncnn and MNN take no model-local functions, and most of them neither CastLike nor weights
that the graph puts together. Here functions are inlined, weights joined, casts written with their type, nodes sorted
and named. Sizes are numbers, plain names, or unnamed where they follow from others: a runtime that reads `height // 2`
makes an unknown of it that equals nothing else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import msgspec
import onnx
import onnx_ir.passes.common as common
from onnxscript import ir

from stepcell.contract import StepContract
from stepcell.dims import Dim
from stepcell.exporter.cell_recognition.normalise import fold_constants
from stepcell.exporter.quiet import errors_only
from stepcell.exporter.step_onnx.graph import separate_outputs, set_shape
from stepcell.ops import DOMAIN

__all__ = ["plain_graph"]

_REASON = "written in standard operators (--plain)"


def plain_graph(model: onnx.ModelProto, contract: StepContract) -> tuple[onnx.ModelProto, StepContract]:
    """The plain form of an exported graph, and its contract, whose cells have no op any more."""
    graph = ir.from_proto(model)
    outputs = [value.name for value in model.graph.output]
    with errors_only("onnxscript", "onnx_ir"):
        fold_constants(graph)
        _write_casts(graph.graph)
        ir.passes.Sequential(
            common.IdentityEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.TopologicalSortPass(),
        )(graph)
    separate_outputs(graph.graph, outputs)  # the optimiser makes equal values one
    for value, name in zip(graph.graph.outputs, outputs, strict=True):
        value.name = name
    _name_nodes(graph.graph)
    graph.opset_imports.pop(DOMAIN, None)
    proto = ir.to_proto(graph)
    del proto.functions[:], proto.graph.value_info[:]
    specs = {**contract.graph_inputs, **contract.graph_outputs}
    for value in (*proto.graph.input, *proto.graph.output):
        set_shape(value, _named(specs[value.name].shape))
    if not contract.symbols:
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    cells = tuple(msgspec.structs.replace(cell, op=None, reason=cell.reason or _REASON) for cell in contract.cells)
    return proto, msgspec.structs.replace(contract, cells=cells)


def _write_casts(graph: ir.Graph) -> None:
    """Replace CastLike by Cast, and a cast to the type that a value has by Identity, which can be removed."""
    for node in list(graph):
        if node.op_type not in ("Cast", "CastLike") or node.domain:
            continue
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        like = node.inputs[1] if node.op_type == "CastLike" else None
        wanted = ir.DataType(node.attributes.get_int("to", 0)) if like is None else like.dtype
        if wanted is None:
            continue
        attributes: dict[str, int] = {} if source.dtype == wanted else {"to": int(wanted)}
        new = ir.node("Cast" if attributes else "Identity", [source], attributes, name=node.name)
        graph.insert_before(node, new)
        value = new.outputs[0]
        value.type, value.shape, value.name = ir.TensorType(wanted), result.shape, result.name
        ir.convenience.replace_all_uses_with(result, value, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _name_nodes(graph: ir.Graph) -> None:
    """Name each node by its path and operator, without characters that other formats give a meaning."""
    used: Counter[str] = Counter()
    for node in graph:
        scope = re.sub(r"[^A-Za-z0-9_/]", "_", (node.name or "").rpartition("/")[0])
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"


def _named(shape: Sequence[Dim]) -> list[Dim | None]:
    """A shape whose expressions have no name: to other runtimes `height // 2` would be an unknown beside `height`."""
    return [dim if isinstance(dim, int) or dim.isidentifier() else None for dim in shape]
