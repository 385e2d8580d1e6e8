"""The form of the ops in which ONNX Runtime's CPU convolutions are quick.

The op's function convolves the concatenation of x and h, which is best for TensorRT. ONNX Runtime has
its quick convolution, over blocks of channels, where their number is a multiple of 4 or below 16
(onnxruntime/core/optimizer/nchwc_transformer.cc); 5 + 32 channels are neither, 5 and 32 each are one.
There the convolution is computed part by part: conv(concat(x, h), concat(W_x, W_h)) = conv(x, W_x) +
conv(h, W_h). A ConvGRU of 5 to 32 channels then takes 0.56 of the time on one thread, 0.77 on two.
Results differ by rounding only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepcell.missing import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx import FunctionProto, ModelProto, NodeProto

__all__ = ["convolve_apart"]

_DOMAIN = "stepcell"
_SUFFIX = "Apart"


def convolve_apart(model: ModelProto) -> bool:
    """Change the cells of a model, in place, that are quicker with x and h apart; whether there are any.

    Args:
        model: its op nodes have their definitions as functions, their weights as initializers.
    """
    require("onnx", extra="ort", purpose="running a model")
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 4}
    functions = {function.name: function for function in model.functions if function.domain == _DOMAIN}
    apart: dict[str, FunctionProto] = {}
    for node in model.graph.node:
        function = functions.get(node.op_type) if node.domain == _DOMAIN else None
        if function is None or not _is_quicker(*(shapes.get(name) for name in _weights(node, function))):
            continue
        changed = apart.get(function.name) or _apart(function)
        if changed is not None:
            apart[function.name] = changed
            node.op_type = changed.name
    model.functions.extend(apart.values())
    return bool(apart)


def _weights(node: NodeProto, function: FunctionProto) -> list[str]:
    """The names of a cell's weights of x and of h."""
    given = dict(zip(function.input, node.input, strict=False))
    return [given.get("W_x", ""), given.get("W_h", "")]


def _is_quicker(of_x: tuple[int, ...] | None, of_h: tuple[int, ...] | None) -> bool:
    """Whether two convolutions of these weights are quicker than one; measured, where both are quick ones."""
    if of_x is None or of_h is None:
        return False
    x, hidden, kernel = of_x[1], of_h[1], of_h[2:]
    return x % 4 != 0 and hidden % 8 == 0 and hidden >= 16 and kernel != (1, 1)


def _apart(function: FunctionProto) -> FunctionProto | None:
    """The function with a sum of convolutions for each convolution of a concatenation; None without one."""
    from onnx import FunctionProto, helper

    made_by = {output: node for node in function.node for output in node.output}
    result = FunctionProto()
    result.CopyFrom(function)
    result.name += _SUFFIX
    del result.node[:]
    for node in function.node:
        maps, kernels = (_parts(made_by.get(name)) for name in node.input[:2]) if node.op_type == "Conv" else ((), ())
        if not maps or len(maps) != len(kernels):
            result.node.append(node)
            continue
        sums = [f"{node.output[0]}_{number}" for number in range(len(maps))]
        for number, (x, w) in enumerate(zip(maps, kernels, strict=True)):
            part = result.node.add()
            part.CopyFrom(node)
            del part.input[:], part.output[:]
            part.input.extend([x, w, *(node.input[2:] if number == 0 else ())])  # the bias once
            part.output.append(sums[number])
        result.node.append(helper.make_node("Sum", sums, node.output))
    return result if len(result.node) != len(function.node) else None


def _parts(node: NodeProto | None) -> Sequence[str]:
    """What a node concatenates along the channels."""
    along = {attribute.name: attribute.i for attribute in node.attribute} if node is not None else {}
    return node.input if node is not None and node.op_type == "Concat" and along == {"axis": 1} else ()
