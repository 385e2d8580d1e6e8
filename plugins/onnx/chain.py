"""Expansion of a cell's plugin node into a chain of nodes, one per kernel, for plugins that hold a single kernel.

Intermediate results (z, r . h, the fp16 mirror of the state) become tensors of the graph, so TensorRT allocates them.
A node is named after its kernel and takes the kernel's pointers in order, without those that its cell does not use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepcell.ops import DOMAIN
from stepcell.optional_imports import require
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.signature import kernel_inputs, kernel_outputs, kernels_of, workspace
from stepcell.plugins.tensorrt.fields import PLUGIN_VERSION
from stepcell.plugins.tensorrt.portable import node_name
from stepcell.plugins.tensorrt.registry import CELL_ATTRIBUTE, FP16_MIRROR_ATTRIBUTE
from stepcell.plugins.tensorrt.tensors import inputs_of, outputs_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["chained_model"]


def chained_model(model: ModelProto) -> ModelProto:
    """Replace every plugin node of a model of `plugin_model` by its chain; `model` itself is not changed."""
    onnx = require("onnx", extra="tensorrt", purpose="building an engine")
    result: ModelProto = onnx.ModelProto()
    result.CopyFrom(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        cell = CellConfig.from_label(next(a.s.decode() for a in node.attribute if a.name == CELL_ATTRIBUTE))
        given = any(a.name == FP16_MIRROR_ATTRIBUTE for a in node.attribute)
        names = {t.buffer: name for t, name in zip(inputs_of(cell, fp16_mirror=given), node.input, strict=True)}
        names |= {t.buffer: name for t, name in zip(outputs_of(cell), node.output, strict=True)}
        names |= {buffer: f"{node.output[0]}.{buffer}" for buffer in workspace(cell, 1, fp16_mirror=given)}
        names.setdefault("h", names["state"])  # a float16 state needs no mirror
        for kernel in kernels_of(cell, fp16_mirror=given):
            nodes.append(
                onnx.helper.make_node(
                    node_name(kernel, cell),
                    [names[each.buffer] for each in kernel_inputs(kernel, cell)],
                    [names[each.buffer] for each in kernel_outputs(kernel)],
                    name=f"{node.name}/{kernel}",
                    domain=DOMAIN,
                    plugin_namespace=DOMAIN,
                    plugin_version=PLUGIN_VERSION,
                    **{CELL_ATTRIBUTE: cell.label},
                )
            )
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result
