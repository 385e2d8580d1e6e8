"""Table of the ops stepcell::ConvGRU and stepcell::ConvLSTM: inputs, weights, gate order, attributes, variants.

Names, order and shapes of the weights are read from here by the ONNX functions, the recogniser and the TensorRT
plugin. The arithmetic is written elsewhere and must follow a change of this table: models/cells.py,
exporter/step_onnx/op_functions.py, exporter/cell_recognition/ and the kernels (docs/adding-a-cell.md lists the files).
docs/op-contract.md has the equations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = [
    "CONV_GRU",
    "CONV_LSTM",
    "DOMAIN",
    "GATES",
    "OPS",
    "PEEPHOLES",
    "RESETS",
    "VERSION",
    "Gates",
    "Op",
    "OpName",
    "OpVariant",
    "Peephole",
    "Reset",
    "Weight",
    "same_pads",
]

DOMAIN = "stepcell"
VERSION = 1

OpName = Literal["ConvGRU", "ConvLSTM"]
Gates = Literal["soft", "hard"]  # sigmoid and tanh, or clamp(x/2 + 1/2, 0, 1) and clamp(x, -1, 1)
Reset = Literal["before", "after"]  # whether r multiplies h before the recurrent convolution or its result
Peephole = Literal["none", "channel", "map"]  # no w_c, w_c (3, C, 1, 1), w_c (3, C, H, W)
OpVariant = Literal["before", "after", "none", "channel", "map"]

GATES: tuple[Gates, ...] = get_args(Gates)
RESETS: tuple[Reset, ...] = get_args(Reset)
PEEPHOLES: tuple[Peephole, ...] = get_args(Peephole)


@dataclass(frozen=True)
class Weight:
    """One weight input of an op.

    Attributes:
        name: name of the op's input.
        kind: decides the shape, where G is the number of gates: "conv_x" (G * C, Cx, kh, kw),
            "conv_h" (G * C, C, kh, kw), "bias" (G * C), "peephole" (G, C, 1, 1) or (G, C, H, W).
        gates: gates that the weight holds, in the order in which they are stacked along the first axis.
        variants: variants of the op that have this input; empty: all.
    """

    name: str
    kind: Literal["conv_x", "conv_h", "bias", "peephole"]
    gates: str
    variants: tuple[OpVariant, ...] = ()

    def shape(self, inputs: int, hidden: int, kernel: tuple[int, int], variant: str) -> tuple[int | None, ...]:
        """Expected shape; None for a size that only the model knows (H and W of a peephole map).

        Args:
            inputs: channels Cx of x.
            hidden: channels C of the state.
            kernel: height and width of the convolution.
            variant: variant of the op.
        """
        rows = len(self.gates) * hidden
        if self.kind == "bias":
            return (rows,)
        if self.kind == "peephole":
            return (len(self.gates), hidden, *((1, 1) if variant == "channel" else (None, None)))
        return (rows, inputs if self.kind == "conv_x" else hidden, *kernel)


@dataclass(frozen=True, eq=False)
class Op:
    """One op of the domain.

    Inputs in order: x, the states, the weights. Outputs in order: the new states (`h_next`, ...), then
    `y`, the new h in the dtype of x.

    Attributes:
        name: `op_type` of the ONNX node.
        states: names of the state inputs; the first one is the output of the cell.
        gates: one letter a gate, in the order of the rows of W_x.
        weights: all weight inputs, those that only some variants have last.
        attributes: allowed values of each string attribute, the default first. Nodes also have `pads`.
        variants: forms that differ in their weights or their arithmetic: of a ConvGRU the attribute
            `reset`, of a ConvLSTM its peephole weights.
    """

    name: OpName
    states: tuple[str, ...]
    gates: str
    weights: tuple[Weight, ...]
    attributes: Mapping[str, tuple[str, ...]]
    variants: tuple[OpVariant, ...]

    @property
    def qualified_name(self) -> str:
        """Domain and name, such as "stepcell::ConvGRU"."""
        return f"{DOMAIN}::{self.name}"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, such as ("h_next", "y")."""
        return (*(f"{state}_next" for state in self.states), "y")

    def weights_of(self, variant: str) -> tuple[Weight, ...]:
        """The weight inputs of a variant, in order."""
        return tuple(weight for weight in self.weights if not weight.variants or variant in weight.variants)

    def inputs_of(self, variant: str) -> tuple[str, ...]:
        """Names of all inputs of a variant, such as ("x", "h", "W_x", "b", "W_h", "W_n")."""
        return ("x", *self.states, *(weight.name for weight in self.weights_of(variant)))

    def variant(self, attributes: Mapping[str, Any], weight_shapes: Mapping[str, Sequence[int]]) -> OpVariant:
        """The variant of a node, from its attributes and the shapes of its weights by name."""
        if "reset" in self.attributes:
            reset: OpVariant = attributes["reset"]
            return reset
        names = (weight.name for weight in self.weights if weight.kind == "peephole")
        peephole = next((weight_shapes[name] for name in names if name in weight_shapes), None)
        if peephole is None:
            return "none"
        return "channel" if tuple(peephole[2:]) == (1, 1) else "map"


CONV_GRU = Op(
    name="ConvGRU",
    states=("h",),
    gates="zrn",
    weights=(
        Weight("W_x", "conv_x", "zrn"),
        Weight("b", "bias", "zrn"),
        Weight("W_h", "conv_h", "zr"),
        Weight("W_n", "conv_h", "n"),
        Weight("b_hn", "bias", "n", variants=("after",)),
    ),
    attributes={"gates": GATES, "reset": RESETS},
    variants=RESETS,
)

CONV_LSTM = Op(
    name="ConvLSTM",
    states=("h", "c"),
    gates="ifog",
    weights=(
        Weight("W_x", "conv_x", "ifog"),
        Weight("b", "bias", "ifog"),
        Weight("W_h", "conv_h", "ifog"),
        Weight("w_c", "peephole", "ifo", variants=("channel", "map")),
    ),
    attributes={"gates": GATES},
    variants=PEEPHOLES,
)

OPS: Mapping[str, Op] = {op.name: op for op in (CONV_GRU, CONV_LSTM)}


def same_pads(kernel: tuple[int, int]) -> list[int]:
    """The attribute `pads` for a kernel of odd sizes: top, left, bottom, right."""
    top, left = kernel[0] // 2, kernel[1] // 2
    return [top, left, top, left]
