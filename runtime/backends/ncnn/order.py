"""The order of a convolution's operands: states before frames.

The functions of the ops convolve the concatenation of x and h. A convolution sums over its channels in their order, and
a sum rounds with the size of what it has gathered. A frame is as a rule larger than a state, and has a mean: with h
first, the rounding error of a step is smaller (docs/performance.md has the figures), and the time is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection

    from onnx import ModelProto

__all__ = ["states_first"]


def states_first(model: ModelProto, states: Collection[str]) -> int:
    """Reorder the channels of concatenations that convolutions alone read, in place, and the weights with them.

    Args:
        model: without functions, with fixed sizes and weights as initializers.
        states: names of the graph inputs that are states.

    Returns:
        The number of concatenations that were reordered.
    """
    from onnx import numpy_helper, shape_inference

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    channels = {
        value.name: value.type.tensor_type.shape.dim[1].dim_value
        for value in (*inferred.value_info, *inferred.input)
        if len(value.type.tensor_type.shape.dim) == 4
    }
    outputs = {port.name for port in graph.output}
    depends, changed = set(states), 0
    for node in graph.node:
        if depends.intersection(node.input):
            depends.update(node.output)
        if node.op_type != "Concat" or node.attribute[0].i != 1 or node.output[0] in outputs:
            continue
        readers = [each for each in graph.node if node.output[0] in each.input]
        kernels = [weights.get(reader.input[1]) for reader in readers if reader.op_type == "Conv"]
        order = sorted(range(len(node.input)), key=lambda at: node.input[at] not in depends)  # stable
        sizes = [channels.get(name, 0) for name in node.input]
        fits = [kernel is not None and kernel.dims[1] == sum(sizes) for kernel in kernels]
        if len(kernels) != len(readers) or order == sorted(order) or not all(sizes) or not all(fits):
            continue
        places = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        moved = np.concatenate([places[at] for at in order])
        node.input[:] = [node.input[at] for at in order]
        for number, reader in enumerate(readers):
            tensor = weights[reader.input[1]]
            reader.input[1] = f"stepcell.states_first.{changed}.{number}"
            ordered = np.ascontiguousarray(numpy_helper.to_array(tensor)[:, moved])
            graph.initializer.append(numpy_helper.from_array(ordered, reader.input[1]))
        changed += 1
    return changed
