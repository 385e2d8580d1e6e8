"""Output postprocessing: the outputs of a step to what a sink takes, without batch and padding, or as pixels."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import OutputError, StepcellError
from stepcell.pixels import as_chw, gain_and_offset, is_frame_of_bytes, picture_channels, value_range
from stepcell.runtime.media.preprocess import Preprocessor, require_declared
from stepcell.runtime.media.sink import Sink

__all__ = ["NonFinitePixels", "OutputPostprocessor", "choose_output", "crop", "is_label_map", "is_picture", "to_pixels"]

# What pixels of NaN and Inf are: an error, or replaced by 0; or the outputs were checked before.
NonFinitePixels = Literal["error", "replace", "checked"]

_ROWS = 32  # converted at a time


class OutputPostprocessor:
    """Converts the outputs of one step to a frame for a sink.

    Args:
        contract: contract of the model.
        sink: takes pixels or tensors; not written to.
        non_finite: what pixels of NaN and Inf are.

    Attributes:
        output: the output of the model that the sink is given.

    Raises:
        OutputError: the model has no output that the sink takes.
        UsageError: the sink takes pixels, and the range of the output's values is undefined.
    """

    def __init__(self, contract: StepContract, sink: Sink, *, non_finite: NonFinitePixels = "error") -> None:
        self.output = choose_output(contract, sink)
        if sink.takes_pixels and not is_label_map(self.output):
            require_declared(self.output)
        self._pixels, self._non_finite = sink.takes_pixels, non_finite

    def check(self, tensor: NDArray[Any], preprocessor: Preprocessor) -> None:
        """Raise the error of a tensor that the sink cannot show. Arguments are those of the call, which does not check.

        Raises:
            StepcellError: pixels of NaN or Inf, or a label that is no byte.
        """
        if self._pixels:
            layout = self.output.layout or "NCHW"
            tensor = crop(tensor, preprocessor.size, preprocessor.padded, layout)
            _require_pixels(self.output, tensor, finite=self._non_finite == "error")

    def __call__(self, tensor: NDArray[Any], preprocessor: Preprocessor) -> NDArray[Any]:
        """The frame: pixels (H, W, C) uint8; else a picture (C, H, W), or as its layout says, without the padding,
        or the tensor itself.

        Args:
            tensor: `output` of one stream, with a batch of one.
            preprocessor: preprocessor of its frame, for the size.
        """
        layout = self.output.layout
        if layout is None or not is_picture(self.output):
            return tensor[0] if tensor.ndim and len(tensor) == 1 else tensor
        tensor = crop(tensor, preprocessor.size, preprocessor.padded, layout)
        if not self._pixels:
            return tensor[0] if layout[0] == "N" else tensor
        if self._non_finite == "replace":
            tensor = np.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)
        return _pixels(self.output, as_chw(tensor, layout))


def is_picture(spec: TensorSpec) -> bool:
    """Whether an output can be shown: 1 or 3 channels, or none (N, H, W), as of labels."""
    return picture_channels(spec) in (1, 3)


def is_label_map(spec: TensorSpec) -> bool:
    """Whether an output holds labels: integers without a range, which are grey levels as they are."""
    return value_range(spec) is None and not spec.dtype.startswith("float")


def choose_output(contract: StepContract, sink: Sink) -> TensorSpec:
    """The first output that is a picture; for a sink of tensors, the first output if none is a picture.

    Raises:
        OutputError: the sink takes pixels and no output is a picture.
    """
    pictures = sorted(filter(is_picture, contract.outputs), key=lambda spec: "C" not in (spec.layout or ""))
    if pictures:
        return pictures[0]
    if sink.takes_pixels or not contract.outputs:
        names = ", ".join(f"{spec.name} {spec.shape}" for spec in contract.outputs)
        raise OutputError(
            f"{sink.name}: no output of this model is a picture (NCHW or NHWC, 1 or 3 channels): {names or 'none'}",
            hint="--output out.npy writes the tensors themselves",
        )
    return contract.outputs[0]


def crop(output: NDArray[Any], size: tuple[int, int], padded: tuple[int, int], layout: str) -> NDArray[Any]:
    """An output without the padding of the input, such as (1, C, H', W') -> (1, C, H, W); it may be scaled.

    Args:
        output: output of the model.
        layout: its axes.
        size: (height, width) of the frame.
        padded: (height, width) of the input tensor.
    """
    kept = [slice(None)] * output.ndim
    for letter, inner, outer in zip("HW", size, padded, strict=True):
        axis = layout.index(letter)
        kept[axis] = slice(-(-output.shape[axis] * inner // outer))
    return output[tuple(kept)]


def to_pixels(spec: TensorSpec, tensor: NDArray[Any]) -> NDArray[np.uint8]:
    """A picture (C, H, W) as pixels (H, W, C) uint8, RGB or grey: inverse scaling, clipped to 0..255, rounded.

    Labels, which are integers without a range, are the grey levels themselves.

    Raises:
        StepcellError: the tensor holds NaN or Inf, or a label that is no byte.
        UsageError: the range of its values is undefined.
    """
    _require_pixels(spec, tensor, finite=True)
    return _pixels(spec, tensor)


def _require_pixels(spec: TensorSpec, tensor: NDArray[Any], *, finite: bool) -> None:
    if finite and tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
        raise StepcellError(
            f"{spec.name}: the model returned NaN or Inf",
            hint="its states may be corrupted: --reset-every N clears them; float16 models overflow beyond 65504",
        )
    if is_label_map(spec) and tensor.size and not (tensor.min() >= 0 and tensor.max() <= 255):
        raise StepcellError(
            f"{spec.name}: the label {tensor.max() if tensor.max() > 255 else tensor.min()} is no grey level",
            hint=f"--output out.npy writes the labels themselves, --range {spec.name}:LOW,HIGH scales them",
        )


def _pixels(spec: TensorSpec, tensor: NDArray[Any]) -> NDArray[np.uint8]:
    if is_frame_of_bytes(spec):
        return np.ascontiguousarray(tensor.transpose(1, 2, 0))
    channels, height, width = tensor.shape
    pixels = np.empty((height, width, channels), np.uint8)
    planes = list(pixels.transpose(2, 0, 1))
    if spec.channels == "BGR":
        planes.reverse()
    if is_label_map(spec):
        for plane, labels in zip(planes, tensor, strict=True):
            np.copyto(plane, labels, casting="unsafe")
        return pixels
    gain, offset = gain_and_offset(spec, channels)
    factor = (1 / gain).astype(np.float32)
    values = np.empty((channels, min(_ROWS, height), width), np.float32)
    # Some rows at a time, which stay in the cache, and one channel after the other: a third of the time of all at once.
    for row in range(0, height, _ROWS):
        part = tensor[:, row : row + _ROWS]
        block = values[:, : part.shape[1]]
        np.subtract(part, offset, out=block, dtype=np.float32)
        block *= factor
        np.clip(block, 0, 255, out=block)
        np.rint(block, out=block)
        for plane, rounded in zip(planes, block, strict=True):
            plane[row : row + _ROWS] = rounded.astype(np.uint8)
    return pixels
