"""Rewrite of the ops' nodes in an ONNX model as nodes that TensorRT's parser gives to the plugin.

A node keeps its name, its states and its outputs, and gets the fp16 mirror of its h as an input where there is one
(mirrors.py). Its weights are packed (kernels/packing.py), once, at build time. Its attributes become the label of
the cell and those by which the parser finds a plugin. The ops' functions are removed from the model, because the
parser prefers a function to a plugin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stepcell.contract import StateSpec
from stepcell.errors import BuildError, PluginError, UsageError
from stepcell.library_errors import library_errors
from stepcell.ops import DOMAIN, OPS, same_pads
from stepcell.optional_imports import require
from stepcell.plugins.fp16_mirrors import Fp16Mirror
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.packing import pack
from stepcell.plugins.onnx.mirrors import add_fp16_mirrors, all_nodes
from stepcell.plugins.tensorrt.fields import PLUGIN_VERSION
from stepcell.plugins.tensorrt.registry import CELL_ATTRIBUTE, FP16_MIRROR_ATTRIBUTE
from stepcell.plugins.tensorrt.tensors import weights_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = ["PluginModel", "has_cells", "plugin_model"]

_FLOAT, _HALF = 1, 10  # onnx.TensorProto.DataType


@dataclass(frozen=True)
class PluginModel:
    """A model rewritten for the plugin.

    Attributes:
        model: with packed weights and without the ops' functions.
        cells: (name of the tensor h, cell) of every node.
        fp16_mirrors: inputs and outputs that were added to the model.
    """

    model: ModelProto
    cells: tuple[tuple[str, CellConfig], ...]
    fp16_mirrors: tuple[Fp16Mirror, ...] = ()


def has_cells(model: ModelProto) -> bool:
    """Whether the graph has nodes of the ops."""
    return any(_is_cell(node) for node in model.graph.node)


def plugin_model(model: ModelProto, states: Sequence[StateSpec] = ()) -> PluginModel:
    """Rewrite every cell of a model for the plugin; `model` itself is not changed.

    Args:
        states: states that may get a fp16 mirror as input and output of the model.

    Raises:
        PluginError: a cell that the plugin cannot run: not float16, weights computed in the graph, sizes outside
            the op's rules, or a node inside a function or a subgraph.
    """
    onnx = require("onnx", extra="tensorrt", purpose="building an engine")
    _refuse_nested(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    types = _types(onnx, model)
    found = []
    for node in filter(_is_cell, graph.node):
        where = f"cell {node.name or node.output[0]!r}"
        arrays = _weights(onnx, node, weights, where)
        found.append((node, _cell(onnx, node, arrays, types, where), arrays))
    cells = tuple((node.input[1], cell) for node, cell, _ in found)
    wide = [node for node, cell, _ in found if cell.state_dtype == "float32"]
    halves, mirrors = add_fp16_mirrors(onnx, graph, wide, states)
    for node, cell, arrays in found:
        _replace(onnx, graph, node, cell, halves.get(node.input[1]), pack(cell, arrays))
    functions = [each for each in result.functions if (each.domain, each.name) not in {(DOMAIN, op) for op in OPS}]
    del result.functions[:]
    result.functions.extend(functions)
    _drop_unused(graph)
    return PluginModel(result, cells, mirrors)


def _is_cell(node: NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in OPS


def _refuse_nested(model: ModelProto) -> None:
    inside = [node for function in model.functions for node in all_nodes(function.node)]
    inside += [node for top in model.graph.node for node in all_nodes([top]) if node is not top]
    if any(_is_cell(node) for node in inside):
        raise PluginError("a cell is inside a function or a subgraph; the plugin runs cells of the main graph only")


def _types(onnx: Any, model: ModelProto) -> dict[str, int]:
    """Element types of the graph's tensors, inferred where the file does not state them."""
    with library_errors("the graph", BuildError, what="its types cannot be inferred"):
        inferred = onnx.shape_inference.infer_shapes(model)
    tensors = (*inferred.graph.input, *inferred.graph.value_info)
    return {tensor.name: tensor.type.tensor_type.elem_type for tensor in tensors}


def _weights(onnx: Any, node: NodeProto, weights: Mapping[str, TensorProto], where: str) -> dict[str, Any]:
    op = OPS[node.op_type]
    names = node.input[1 + len(op.states) :]
    computed = [name for name in names if name not in weights]
    if computed:
        raise PluginError(f"{where}: weight {computed[0]!r} is computed in the graph, the plugin needs constants")
    arrays = [onnx.numpy_helper.to_array(weights[name]) for name in names]
    return {weight.name: array for weight, array in zip(op.weights, arrays, strict=False)}


def _cell(onnx: Any, node: NodeProto, arrays: Mapping[str, Any], types: Mapping[str, int], where: str) -> CellConfig:
    op = OPS[node.op_type]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    missing = [name for name in ("pads", *op.attributes) if name not in attributes]
    if missing:
        raise PluginError(f"{where}: has no attribute {missing[0]!r}")
    w_x = arrays["W_x"]
    if w_x.dtype != "float16":
        raise PluginError(f"{where}: computes in {w_x.dtype}, the plugin in float16", hint="export with float16")
    states = {types.get(name) for name in node.input[1 : 1 + len(op.states)]}
    if states not in ({_FLOAT}, {_HALF}):
        raise PluginError(f"{where}: its states must be all float32 or all float16")
    kernel = (int(w_x.shape[2]), int(w_x.shape[3]))
    pads = same_pads(kernel)
    if list(attributes["pads"]) != pads:
        raise PluginError(
            f"{where}: pads must be {pads} for a {kernel[0]}x{kernel[1]} kernel, got {attributes['pads']}"
        )
    texts = {name: attributes[name].decode() for name in op.attributes}
    try:
        return CellConfig(
            op=op.name,
            inputs=int(w_x.shape[1]),
            hidden=int(arrays["W_h"].shape[1]),
            kernel=kernel,
            variant=op.variant(texts, {name: array.shape for name, array in arrays.items()}),
            gates=texts["gates"],
            state_dtype="float32" if states == {_FLOAT} else "float16",
        )
    except UsageError as error:
        raise PluginError(f"{where}: {error.message}") from error


def _replace(
    onnx: Any, graph: GraphProto, node: NodeProto, cell: CellConfig, half: str | None, packed: Mapping[str, Any]
) -> None:
    states = [*node.input[: 1 + len(OPS[cell.op].states)], *([half] if half else [])]
    names = {tensor.buffer: f"{node.output[0]}.{tensor.buffer}" for tensor in weights_of(cell)}
    graph.initializer.extend(onnx.numpy_helper.from_array(packed[buffer], name) for buffer, name in names.items())
    del node.input[:], node.attribute[:]
    node.input.extend([*states, *names.values()])
    # TensorRT 10.10 and later take the namespace from the node's domain, earlier versions from the attribute; all
    # take the version from the attribute ("1" if it is missing).
    attributes: dict[str, str | int] = {
        CELL_ATTRIBUTE: cell.label,
        "plugin_namespace": DOMAIN,
        "plugin_version": PLUGIN_VERSION,
    }
    attributes |= {FP16_MIRROR_ATTRIBUTE: 1} if half else {}
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())


def _drop_unused(graph: GraphProto) -> None:
    used = {name for node in all_nodes(graph.node) for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
