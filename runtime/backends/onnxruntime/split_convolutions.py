"""The form of a model in which ONNX Runtime's CPU convolutions are quick, for sizes that are known.

The ops' functions convolve the concatenation of x and h, which is best for TensorRT. On a CPU the convolution is
computed part by part: conv(concat(x, h), concat(W_x, W_h)) = conv(x, W_x) + conv(h, W_h). So x and h are not
copied together, and what several convolutions read is brought into their layout (blocks of channels) once. The sum
costs nothing where ONNX Runtime makes it part of the second convolution, which it does if it knows that both results
have the same size. Most is gained where the two together have no quick convolution: ONNX Runtime's is over blocks
of 16 channels with AVX-512 (onnxruntime/core/optimizer/nchwc_transformer.cc), and 5 + 32 channels fill none, while
32 do and 5 alone are few enough. Results differ by rounding only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stepcell.missing import require

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["convolve_apart"]

_PREFIX = "stepcell.apart"


def convolve_apart(model: ModelProto) -> int:
    """Change the convolutions of a model, in place, that are quicker part by part; how many of them.

    Args:
        model: without functions; its inputs have sizes, its weights are initializers.
    """
    require("onnx", extra="ort", purpose="running a model")
    from onnx import numpy_helper

    graph = model.graph
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return 0  # a branch or a loop's body, which reads values by their names
    shapes = _shapes(model)
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 4}
    concatenated = {node.output[0]: node for node in graph.node if node.op_type == "Concat"}
    nodes: list[NodeProto] = []
    changed = 0
    for node in graph.node:
        concat = concatenated.get(node.input[0]) if node.op_type == "Conv" and node.domain == "" else None
        kernel = weights.get(node.input[1]) if concat is not None else None
        parts = [shapes.get(name, ()) for name in concat.input] if concat is not None else []
        if concat is None or kernel is None or not _is_quicker(parts, tuple(kernel.dims)):
            nodes.append(node)
            continue
        channels = [shape[1] for shape in parts]
        apart = np.split(numpy_helper.to_array(kernel), np.cumsum(channels)[:-1], axis=1)
        nodes.extend(_sum(node, concat.input, apart, f"{_PREFIX}.{changed}", graph))
        changed += 1
    if changed:
        _replace(graph, nodes)
    return changed


def _is_quicker(parts: Sequence[tuple[int, ...]], kernel: tuple[int, ...]) -> bool:
    """Whether two convolutions of these maps (batch, channels, height, width) and weights are quicker than one.

    Measured on cells of 1 to 256 channels and 8x8 to 64x64 pixels: from as quick to 1.8 times. With a number of
    hidden channels that is no multiple of 8, or 1x1 weights, some are slower. The batch must not decide, since
    slots equal loops of their own.
    """
    if len(parts) != 2 or not all(len(shape) == 4 and all(shape) for shape in parts):
        return False  # of a size that is not known
    x, hidden = (shape[1] for shape in parts)
    if kernel[1] != x + hidden:
        return False  # concatenated along another axis, or convolved in groups
    return hidden % 8 == 0 and hidden >= 16 and kernel[0] % 8 == 0 and kernel[2:] != (1, 1)


def _sum(
    node: NodeProto, maps: Sequence[str], weights: Sequence[NDArray[Any]], prefix: str, graph: GraphProto
) -> list[NodeProto]:
    """The convolutions of two parts and their sum; the first has the bias."""
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


def _replace(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Put other nodes into a graph, without those and the weights that nothing reads any more."""
    used, live = {output.name for output in graph.output}, []
    for node in reversed(nodes):
        if used.intersection(node.output):
            live.append(node)
            used.update(node.input)
    read = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(live))
    graph.initializer.extend(read)


def _shapes(model: ModelProto) -> Mapping[str, tuple[int, ...]]:
    """The shapes of all values, as far as they are known; 0 is an unknown size."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
