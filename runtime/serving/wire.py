"""Frames as clients send and get them: pixels where the model takes pictures, tensors otherwise.

Each array has a first axis of size 1, as the server batches along it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.dims import Dim
from stepcell.errors import InputError, StepcellError, UsageError
from stepcell.nv12 import nv12_of
from stepcell.pixels import as_chw, picture_channels, value_range
from stepcell.runtime.loop.slots import SlotTable
from stepcell.runtime.media.postprocess import crop, is_label_map, is_picture, to_pixels
from stepcell.runtime.media.preprocess import Preprocessor, image_input, require_declared
from stepcell.runtime.serving.protocol import RESERVED

__all__ = ["Port", "Wire", "takes_pixels"]


@dataclass(frozen=True)
class Port:
    """An input or output as clients see it, without the axis of streams.

    Attributes:
        spec: in the contract.
        axis: its axis of streams in the model.
        pixels: (height, width, channels) uint8, RGB or grey, instead of the model's tensor.
    """

    spec: TensorSpec
    axis: int
    pixels: bool

    @property
    def dtype(self) -> str:
        """Element type."""
        return "uint8" if self.pixels else self.spec.dtype

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Numbers and symbols."""
        if self.pixels:
            layout = self.spec.layout or ""
            height, width = (self.spec.shape[layout.index(letter)] for letter in "HW")
            free = self.spec.pad_multiple > 1  # smaller frames are padded
            return ("height" if free else height, "width" if free else width, picture_channels(self.spec) or 1)
        return self.spec.shape[: self.axis] + self.spec.shape[self.axis + 1 :]


class Wire:
    """Converts between a client's arrays and those of a slot.

    Args:
        contract: of the model.
        slots: rows of the batch.
        pixels: take frames as pixels, and answer with pixels where an output is a picture of a declared range. Other
            pictures are answered without the padding.

    Attributes:
        inputs, outputs: as clients see them. An input that has a value in the contract is not among them.

    Raises:
        InputError: pixels, and the model does not take one picture.
        UsageError: its streams cannot share a batch, the range of the pictures is undefined, or an input or output has
            a name of the protocol.
    """

    def __init__(self, contract: StepContract, slots: int, *, pixels: bool) -> None:
        table = SlotTable(contract, slots)
        taken = [spec.name for spec in (*contract.inputs, *contract.outputs) if spec.name in RESERVED]
        if taken:
            raise UsageError(f"{taken[0]}: this name is one of the protocol ({', '.join(RESERVED)}); rename it")
        self.pixels = pixels
        picture = image_input(contract, slots) if pixels else None
        if picture is not None:
            if picture.events:
                raise InputError(f"{picture.name}: the model takes events, not pixels")
            if nv12_of(picture):
                raise InputError(f"{picture.name}: the model takes NV12, which is sent as its tensor: --frames tensors")
            require_declared(picture)
        inputs = [spec for spec in contract.inputs if spec.value is msgspec.UNSET]
        self.inputs = [Port(spec, table.input_axes[spec.name], spec is picture) for spec in inputs]
        self.outputs = [
            Port(spec, table.output_axes[spec.name], pixels and is_picture(spec) and value_range(spec) is not None)
            for spec in contract.outputs
        ]
        self._preprocessors: dict[int, Preprocessor] = {}  # by row: a tensor of each is read at the next step

    def to_model(self, row: int, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The inputs of a slot; arrays are valid until the next call for the same row.

        Raises:
            InputError: a name or shape that does not fit.
        """
        expected = {port.spec.name for port in self.inputs}
        if set(arrays) != expected:
            raise InputError(f"frame: expected {', '.join(expected)}, got {', '.join(arrays) or 'nothing'}")
        return {port.spec.name: self._input(port, row, arrays[port.spec.name]) for port in self.inputs}

    def to_client(self, row: int, outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs of a slot as the client gets them; later steps do not change them.

        Raises:
            StepcellError: pixels of NaN or Inf.
        """
        return {port.spec.name: self._output(port, row, outputs[port.spec.name]) for port in self.outputs}

    def _input(self, port: Port, row: int, array: NDArray[Any]) -> NDArray[Any]:
        if not array.ndim or len(array) != 1:
            raise InputError(f"{port.spec.name}: expected one frame, a first axis of size 1, got {array.shape}")
        if not port.pixels:
            return np.moveaxis(array, 0, port.axis)
        frame = array[0]
        if frame.dtype != np.uint8 or frame.ndim != 3:
            raise InputError(f"{port.spec.name}: expected pixels (1, H, W, C) uint8, got {array.shape} {array.dtype}")
        found = self._preprocessors.get(row)
        if found is None or found.shape != frame.shape:
            found = self._preprocessors[row] = Preprocessor(port.spec, frame)
        return found(frame)

    def _output(self, port: Port, row: int, array: NDArray[Any]) -> NDArray[Any]:
        layout = port.spec.layout
        if self.pixels and layout and is_picture(port.spec):
            found = self._preprocessors[row]
            array = crop(array, found.size, found.padded, layout)
            if port.pixels and not is_label_map(port.spec):
                return to_pixels(port.spec, as_chw(array, layout))[None]
        return np.array(np.moveaxis(array, port.axis, 0), order="C")


def takes_pixels(contract: StepContract, slots: int) -> bool:
    """Whether frames can be sent as pixels."""
    try:
        return Wire(contract, slots, pixels=True).pixels
    except StepcellError:
        return False
