"""Keeping small convolutions in the plain layout, in which ONNX Runtime's CPU provider computes them faster.

With constant weights ONNX Runtime brings a convolution into a layout of blocks of 8 or 16 channels, fills up the last
block of the output with zeros, and copies what is left of it back (onnxruntime/core/optimizer/nchwc_transformer.cc). An
input of fewer channels than a block stays plain. So a 1x1 convolution of 3 to 3 channels computes 16, and takes seven
to ten times as long as in the plain layout. Weights that are an input of the graph with a default value are not
constant, and nothing else about them changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepcell.optional_imports import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx import ModelProto

__all__ = ["keep_plain"]

_PREFIX = "stepcell.plain"
_BLOCK = 16  # channels, with AVX-512; 8 with AVX2


def keep_plain(model: ModelProto) -> int:
    """Let ONNX Runtime compute small convolutions in the plain layout, in place.

    Args:
        model: with weights as initializers.

    Returns:
        The number of convolutions that were changed.
    """
    require("onnx", extra="ort", purpose="running a model")
    from onnx import TensorProto, helper

    graph = model.graph
    given = {tensor.name for tensor in graph.input}
    weights = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in given
    }
    changed = 0
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "Conv" and node.domain == "" else None
        grouped = any(each.name == "group" and each.i != 1 for each in node.attribute)
        if weight is None or grouped or not _is_faster(weight.dims):
            continue
        name = f"{_PREFIX}.{changed}"
        copy = graph.initializer.add()
        copy.CopyFrom(weight)
        copy.name = node.input[1] = name
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, weight.dims))
        changed += 1
    return changed


def _is_faster(kernel: Sequence[int]) -> bool:
    """Whether a convolution is faster in the plain layout.

    Measured at 320x240 with one and two threads (AVX-512): 1x1 kernels of 3 and 8 to 1 to 12 channels take 1/16 to 1/3
    of the time, 3x3 kernels of 3 to 1 to 4 channels 1/4 to 1/1.3, and of 8 channels 1/3.3 to 1/1.1. To more channels
    3x3 kernels are slower, and so are those of 16 channels and more, whose input would have to be copied back from
    blocks.

    Args:
        kernel: shape of the weights (channels out, channels in, height, width).
    """
    if len(kernel) != 4 or kernel[1] >= _BLOCK or kernel[0] >= _BLOCK:
        return False
    return tuple(kernel[2:]) == (1, 1) or (kernel[0] <= 4 and max(kernel[2:]) <= 3)
