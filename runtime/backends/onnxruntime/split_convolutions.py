"""Splitting Conv(Concat(x, h)) into two convolutions, which ONNX Runtime's CPU provider computes faster.

The functions of the ops convolve the concatenation of x and h, which suits TensorRT. On a CPU

    Conv(Concat(x, h), Concat(W_x, W_h)) = Conv(x, W_x) + Conv(h, W_h)

saves the copy of x and h, and an input of several convolutions is brought into their blocked layout once. The sum is
free: ONNX Runtime fuses it into the second convolution if it knows that both results have the same shape. The gain is
largest where the concatenation has no fast convolution: ONNX Runtime's works on blocks of 16 channels with AVX-512
(onnxruntime/core/optimizer/nchwc_transformer.cc), which 5 + 32 channels do not fill, while 32 do and 5 are few enough.
Results differ by rounding only. The model must have fixed sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stepcell.optional_imports import require
from stepcell.runtime.backends.onnxruntime.graph_changes import has_bodies, replace_nodes, static_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["split_convolutions"]

_PREFIX = "stepcell.split"


def split_convolutions(model: ModelProto) -> int:
    """Split the convolutions of a model that are faster in two parts, in place.

    Args:
        model: without functions, with fixed input sizes and weights as initializers.

    Returns:
        The number of convolutions that were split.
    """
    require("onnx", extra="ort", purpose="running a model")
    from onnx import numpy_helper

    graph = model.graph
    if has_bodies(graph):
        return 0
    shapes = static_shapes(model)
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 4}
    concatenated = {node.output[0]: node for node in graph.node if node.op_type == "Concat"}
    nodes: list[NodeProto] = []
    changed = 0
    for node in graph.node:
        concat = concatenated.get(node.input[0]) if node.op_type == "Conv" and node.domain == "" else None
        kernel = weights.get(node.input[1]) if concat is not None else None
        parts = [shapes.get(name, ()) for name in concat.input] if concat is not None else []
        if concat is None or kernel is None or not _is_faster(parts, tuple(kernel.dims)):
            nodes.append(node)
            continue
        channels = [shape[1] for shape in parts]
        parts_of_kernel = np.split(numpy_helper.to_array(kernel), np.cumsum(channels)[:-1], axis=1)
        nodes.extend(_sum(node, concat.input, parts_of_kernel, f"{_PREFIX}.{changed}", graph))
        changed += 1
    if changed:
        replace_nodes(graph, nodes)
    return changed


def _is_faster(parts: Sequence[tuple[int, ...]], kernel: tuple[int, ...]) -> bool:
    """Whether two convolutions are faster than one.

    Measured on cells of 1 to 256 channels and 8x8 to 64x64 pixels, the split takes between the same time and 1/1.8 of
    it. Some cells are slower when the number of hidden channels is not a multiple of 8, or with 1x1 kernels. The batch
    size must not matter: a slot has to give the same results as a loop of its own.

    Args:
        parts: shapes (batch, channels, height, width) that are concatenated.
        kernel: shape of the weights.
    """
    if len(parts) != 2 or not all(len(shape) == 4 and all(shape) for shape in parts):
        return False  # an unknown size
    x, hidden = (shape[1] for shape in parts)
    if kernel[1] != x + hidden:
        return False  # concatenated along another axis, or a grouped convolution
    return hidden % 8 == 0 and hidden >= 16 and kernel[0] % 8 == 0 and kernel[2:] != (1, 1)


def _sum(
    node: NodeProto, maps: Sequence[str], weights: Sequence[NDArray[Any]], prefix: str, graph: GraphProto
) -> list[NodeProto]:
    """Two convolutions and their sum; the first one has the bias."""
    from onnx import NodeProto, helper, numpy_helper

    convolutions: list[NodeProto] = []
    for number, (x, part) in enumerate(zip(maps, weights, strict=True)):
        kernel, product = f"{prefix}.weights{number}", f"{prefix}.part{number}"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(part), kernel))
        convolution = NodeProto()
        convolution.CopyFrom(node)
        convolution.name = product
        convolution.input[:] = [x, kernel, *(node.input[2:] if number == 0 else ())]
        convolution.output[:] = [product]
        convolutions.append(convolution)
    products = [convolution.output[0] for convolution in convolutions]
    return [*convolutions, helper.make_node("Add", products, node.output, name=f"{prefix}.sum")]
