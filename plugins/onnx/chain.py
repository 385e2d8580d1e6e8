"""A cell as a chain of nodes, one per kernel: the form for plugins that hold a single kernel.

What one kernel hands to the next (z, r . h, the fp16 mirror of the state) becomes a tensor of the graph, so
TensorRT provides its memory. A node is named after its kernel and takes the kernel's pointers in order,
without those that its cell does not use.
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
    """A model of `nodes.plugin_model` with every plugin node replaced by its chain; `model` stays as it is."""
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
        names.setdefault("h", names["state"])  # a half state is its own fp16 mirror
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
