"""Nodes that convert pixels, in front of a graph and behind it.

Scaling to the range, mean and std, the order of the channels, the layout and the padding become nodes in front of the
model, and their inverse, rounding half to even, nodes behind it. The arithmetic is that of `stepcell run` on floats, in
float32. The casts are the first and the last node: TensorRT takes bytes at inputs and outputs only, before and after a
cast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from stepcell.contract import Spec, StepContract, TensorSpec
from stepcell.exporter.step_onnx.graph import set_shape
from stepcell.nv12 import Nv12
from stepcell.pixels import gain_and_offset, picture_channels

__all__ = ["Frame", "PixelNodes", "bytes_layout"]

_AXES_AS_INPUT = 18  # the first opset with the axes of ReduceMean as an input


@dataclass(frozen=True)
class Frame:
    """Names of the sizes of a padded input as tensors of the graph, in the order of its layout.

    Attributes:
        sizes: of the frame.
        padded: of the frame with its padding.
    """

    spec: TensorSpec
    sizes: str
    padded: str


@dataclass
class PixelNodes:
    """Nodes in front of a graph and behind it."""

    graph: onnx.GraphProto
    opset: int
    front: list[onnx.NodeProto] = field(default_factory=list)
    behind: list[onnx.NodeProto] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.taken = _names(self.graph)

    def convert_input(self, spec: TensorSpec, multiples: Sequence[int], nv12: Nv12 | None = None) -> Frame | None:
        """Bytes, of NV12 or as `bytes_layout` says, to what the model takes; the sizes where they are padded."""
        layout, stem = str(spec.layout), f"{spec.name}.pixels"
        gain, offset = _scaling(spec)
        made, frame = self.front, None
        value = self._add(made, "Cast", stem, spec.name, to=TensorProto.FLOAT)
        before = bytes_layout(layout)
        if nv12 is not None:
            value = self._from_nv12(spec, stem, value, nv12)
            before = "".join(letter for letter in "NCHW" if letter in layout)
        if before != layout:
            value = self._add(made, "Transpose", stem, value, perm=[before.index(letter) for letter in layout])
        if spec.channels == "BGR" and nv12 is None:
            value = self._reversed(made, stem, value, layout.index("C"))
        if (gain != 1).any():
            value = self._add(made, "Mul", stem, value, self._constant(stem, gain))
        if offset.any():
            value = self._add(made, "Add", stem, value, self._constant(stem, offset))
        if max(multiples) > 1:
            value, frame = self._pad(spec, stem, value, multiples)
        if spec.dtype != "float32":
            value = self._add(made, "Cast", stem, value, to=_type(spec))
        _rename(self.graph, spec.name, value)
        return frame

    def _from_nv12(self, spec: TensorSpec, stem: str, value: str, how: Nv12) -> str:
        """(N, H * 3 // 2, W), or without N, to (N, C, H, W) of 0 to 255 in the order of the model's channels.

        The arithmetic is that of `nv12_to_rgb`. Shapes are written with 0 (as before) and -1, so no node reads a size.
        Chroma is combined before it is enlarged: a quarter of the work.
        """
        made, batch = self.front, "N" in str(spec.layout)
        gain, offset, weights = how.coefficients()
        weights = weights[::-1] if spec.channels == "BGR" else weights

        def number(*values: float) -> str:
            return self._constant(stem, np.array(values, np.float32).reshape(1, -1, 1, 1))

        def shaped(op: str, value: str, *sizes: int) -> str:
            return self._add(made, op, stem, value, self._constant(stem, np.array(sizes, np.int64)))

        value = shaped("Unsqueeze", value, *([2] if batch else [0, 2]))
        value = shaped("Reshape", value, 0, 3, -1, 0)  # (N, 3, H / 2, W): two halves of luma, then chroma
        luma, chroma = self._split(stem, value, (2, 1))
        luma = self._add(made, "Mul", stem, shaped("Reshape", luma, 0, 1, -1, 0), number(gain))
        chroma = shaped("Reshape", shaped("Squeeze", chroma, 1), 0, 0, -1, 2)
        chroma = self._add(made, "Transpose", stem, chroma, perm=[0, 3, 1, 2])
        of_u, of_v = (
            self._add(made, "Mul", stem, plane, number(*column))
            for plane, column in zip(self._split(stem, chroma, (1, 1)), weights.T, strict=True)
        )
        constant = number(*(-128 * weights.sum(1) - gain * offset))
        added = self._add(made, "Add", stem, self._add(made, "Add", stem, of_u, of_v), constant)
        scales = self._constant(stem, np.array([1, 1, 2, 2], np.float32))
        settings = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        added = self._add(made, "Resize", stem, added, "", scales, **settings)
        low, high = (self._constant(stem, np.array(limit, np.float32)) for limit in (0, 255))
        value = self._add(made, "Clip", stem, self._add(made, "Add", stem, luma, added), low, high)
        return value if batch else shaped("Squeeze", value, 0)

    def _split(self, stem: str, value: str, sizes: tuple[int, int]) -> tuple[str, str]:
        """Two parts along axis 1."""
        name = self._fresh(f"{stem}/Split")
        first, second = (self._fresh(f"{name}/{part}") for part in range(2))
        given = self._constant(stem, np.array(sizes, np.int64))
        self.front.append(helper.make_node("Split", [value, given], [first, second], name, axis=1))
        return first, second

    def _pad(self, spec: TensorSpec, stem: str, value: str, multiples: Sequence[int]) -> tuple[str, Frame]:
        made, by = self.front, np.array(multiples, np.int64)
        sizes = self._add(made, "Shape", stem, value)
        whole = self._add(made, "Add", stem, sizes, self._constant(stem, by - 1))
        whole = self._add(made, "Div", stem, whole, self._constant(stem, by))
        padded = self._add(made, "Mul", stem, whole, self._constant(stem, by))
        ends = self._add(made, "Sub", stem, padded, sizes)
        pads = self._add(made, "Concat", stem, self._constant(stem, np.zeros(len(by), np.int64)), ends, axis=0)
        return self._add(made, "Pad", stem, value, pads, mode="edge"), Frame(spec, sizes, padded)

    def convert_output(self, spec: TensorSpec, frame: Frame | None) -> TensorSpec:
        """What the model returns to bytes; the spec of the mean of the values."""
        layout, stem = str(spec.layout), f"{spec.name}.pixels"
        gain, offset = _scaling(spec, inverse=True)
        made = self.behind
        value = self._values_of(spec.name, stem)
        if spec.dtype != "float32":
            value = self._add(made, "Cast", stem, value, to=TensorProto.FLOAT)
        if frame is not None:
            value = self._crop(spec, stem, value, frame)
        mean = self._mean(spec, stem, value)
        if offset.any():
            value = self._add(made, "Sub", stem, value, self._constant(stem, offset))
        if (gain != 1).any():
            value = self._add(made, "Mul", stem, value, self._constant(stem, gain))
        low, high = (self._constant(stem, np.array(limit, np.float32)) for limit in (0, 255))
        value = self._add(made, "Clip", stem, value, low, high)
        value = self._add(made, "Round", stem, value)
        if spec.channels == "BGR":
            value = self._reversed(made, stem, value, layout.index("C"))
        if (after := bytes_layout(layout)) != layout:
            value = self._add(made, "Transpose", stem, value, perm=[layout.index(letter) for letter in after])
        self._add(made, "Cast", stem, value, to=TensorProto.UINT8, output=spec.name)
        return mean

    def crop_output(self, spec: TensorSpec, frame: Frame) -> None:
        """Cut the padding off an output that is not converted."""
        stem = f"{spec.name}.crop"
        value = self._values_of(spec.name, stem)
        self._crop(spec, stem, value, frame, output=spec.name)

    def _crop(self, spec: TensorSpec, stem: str, value: str, frame: Frame, output: str | None = None) -> str:
        made, layout = self.behind, str(spec.layout)

        def of(vector: str, axes: str) -> str:
            places = np.array([axes.index(letter) for letter in "HW"], np.int64)
            return self._add(made, "Gather", stem, vector, self._constant(stem, places), axis=0)

        sizes, padded = of(frame.sizes, str(frame.spec.layout)), of(frame.padded, str(frame.spec.layout))
        ends = self._add(made, "Mul", stem, of(self._add(made, "Shape", stem, value), layout), sizes)
        ends = self._add(made, "Add", stem, ends, padded)
        ends = self._add(made, "Sub", stem, ends, self._constant(stem, np.ones(2, np.int64)))
        ends = self._add(made, "Div", stem, ends, padded)
        starts = self._constant(stem, np.zeros(2, np.int64))
        axes = self._constant(stem, np.array([layout.index(letter) for letter in "HW"], np.int64))
        return self._add(made, "Slice", stem, value, starts, ends, axes, output=output)

    def _mean(self, spec: TensorSpec, stem: str, value: str) -> TensorSpec:
        """The mean of a picture, of the means of its rows: ONNX Runtime's sum of a frame of 1080p is 1e-3 off."""
        layout = str(spec.layout)
        name = self._fresh(f"{spec.name}.mean")
        of_rows = self._reduced(stem, value, [layout.index("W")], keepdims=1)
        self._reduced(stem, of_rows, [axis for axis, letter in enumerate(layout) if letter != "N"], 0, output=name)
        batch = [dim for dim, letter in zip(spec.shape, str(spec.layout), strict=True) if letter == "N"]
        self.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        axis = 0 if isinstance(spec.batch_axis, int) else spec.batch_axis
        return TensorSpec(name=name, shape=tuple(batch), batch_axis=axis)

    def _reduced(self, stem: str, value: str, axes: list[int], keepdims: int, output: str | None = None) -> str:
        if self.opset < _AXES_AS_INPUT:
            return self._add(self.behind, "ReduceMean", stem, value, output=output, axes=axes, keepdims=keepdims)
        given = self._constant(stem, np.array(axes, np.int64))
        return self._add(self.behind, "ReduceMean", stem, value, given, output=output, keepdims=keepdims)

    def _values_of(self, output: str, stem: str) -> str:
        """Give what the graph computes for an output another name, so that the output can follow from it."""
        name = self._fresh(f"{stem}/values")
        _rename(self.graph, output, name)
        return name

    def _reversed(self, made: list[onnx.NodeProto], stem: str, value: str, axis: int) -> str:
        return self._add(made, "Gather", stem, value, self._constant(stem, np.array([2, 1, 0], np.int64)), axis=axis)

    def _add(
        self, made: list[onnx.NodeProto], op: str, stem: str, *inputs: str, output: str | None = None, **attributes: Any
    ) -> str:
        name = self._fresh(f"{stem}/{op}")
        made.append(helper.make_node(op, list(inputs), [output or name], name, **attributes))
        return output or name

    def _constant(self, stem: str, array: NDArray[Any]) -> str:
        name = self._fresh(f"{stem}/constant")
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _fresh(self, stem: str) -> str:
        name, number = stem, 1
        while name in self.taken:
            number += 1
            name = f"{stem}_{number}"
        self.taken.add(name)
        return name

    def finish(self, contract: StepContract) -> None:
        """Put the nodes into the graph, and types, sizes and order of inputs and outputs as in the contract."""
        between = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.graph.node]
        del self.graph.node[:]
        self.graph.node.extend([*self.front, *between, *self.behind])
        _declare(self.graph.input, contract.graph_inputs)
        _declare(self.graph.output, contract.graph_outputs)
        del self.graph.value_info[:]  # they hold the old sizes; readers infer them again


def bytes_layout(layout: str) -> str:
    """The axes of a picture in the order of the pixels of a frame, as NHWC for NCHW."""
    return "".join(letter for letter in "NHWC" if letter in layout)


def _declare(ports: Any, specs: Mapping[str, Spec]) -> None:
    by_name = {port.name: onnx.ValueInfoProto.FromString(port.SerializeToString()) for port in ports}
    del ports[:]
    for name, spec in specs.items():
        port = by_name[name]
        set_shape(port, spec.shape)
        port.type.tensor_type.elem_type = _type(spec)
        ports.append(port)


def _type(spec: Spec) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)))


def _scaling(spec: TensorSpec, *, inverse: bool = False) -> tuple[NDArray[Any], NDArray[Any]]:
    """Gain and offset in float32, which the layout broadcasts: a number, or one per channel."""
    gain, offset = gain_and_offset(spec, picture_channels(spec) or 1)
    layout = str(spec.layout)
    found = []
    for numbers in (1 / gain if inverse else gain, offset):
        column = numbers.astype(np.float32).reshape(-1)
        if (column == column[0]).all():
            found.append(column[0].reshape(()))
        else:
            found.append(column.reshape([-1 if letter == "C" else 1 for letter in layout]))
    return found[0], found[1]


def _names(graph: onnx.GraphProto) -> set[str]:
    found = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    for node in graph.node:
        found |= {node.name, *node.input, *node.output}
        for inner in _subgraphs(node):
            found |= _names(inner)
    return found


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let every node read and write another name, in graphs inside nodes too."""
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new
        for inner in _subgraphs(node):
            _rename(inner, old, new)
            for output in inner.output:
                if output.name == old:
                    output.name = new


def _subgraphs(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
