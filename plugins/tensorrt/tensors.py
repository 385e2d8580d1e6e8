"""Inputs and outputs of a plugin node in order: content, dtype and memory layout.

The node is an op of docs/op-contract.md whose weights are packed:

    ConvGRU   x, h, [fp16 mirror of h,] weights...     ->  h_next, y
    ConvLSTM  x, h, c, [fp16 mirror of h,] weights...  ->  h_next, c_next, y

Names are those of the buffers in kernels/signature.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepcell.ops import OPS
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.signature import PARAMETERS, kernels_of, pointer_dtype

__all__ = ["Tensor", "inputs_of", "outputs_of", "weights_of"]

_STATE_BUFFERS = ("state", "cell")  # of h and of c


@dataclass(frozen=True)
class Tensor:
    """One input or output of the node.

    Attributes:
        buffer: name of the memory in a step.
        dtype: "float16" or "float32".
        channels_last: laid out (B, H, W, channels rounded up to 8), TensorRT's kHWC8; else linear.
    """

    buffer: str
    dtype: str
    channels_last: bool = False


def inputs_of(cell: CellConfig, *, fp16_mirror: bool = False) -> tuple[Tensor, ...]:
    """Inputs: x, the states, the packed weights.

    Args:
        fp16_mirror: the node has the fp16 mirror of a float32 h as an input, after the states; otherwise the step
            converts the state.
    """
    states = _STATE_BUFFERS[: len(OPS[cell.op].states)]
    maps = [Tensor("x", "float16", channels_last=True), *(_state(cell, name) for name in states)]
    return (*maps, *([Tensor("h", "float16", channels_last=True)] if fp16_mirror else []), *weights_of(cell))


def outputs_of(cell: CellConfig) -> tuple[Tensor, ...]:
    """Outputs: the new states, then y, the new h in float16."""
    states = _STATE_BUFFERS[: len(OPS[cell.op].states)]
    return (*(_state(cell, f"{name}_out") for name in states), Tensor("y", "float16", channels_last=True))


def weights_of(cell: CellConfig) -> tuple[Tensor, ...]:
    """The packed weights, flat, in the order of the kernels and their parameters."""
    return tuple(
        Tensor(parameter.buffer, pointer_dtype(parameter, cell))
        for kernel in kernels_of(cell, fp16_mirror=True)
        for parameter in PARAMETERS[kernel]
        if parameter.buffer.startswith(f"{kernel}.") and (parameter.name != "peephole" or cell.variant != "none")
    )


def _state(cell: CellConfig, name: str) -> Tensor:
    return Tensor(name, cell.state_dtype, channels_last=cell.state_dtype == "float16")
