"""Output postprocessing: the outputs of a step to what a sink takes, without batch and padding, or as pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import OutputError, StepcellError
from stepcell.runtime.media.preprocess import Preprocessor, gain_and_offset, is_image
from stepcell.runtime.media.sink import Sink

__all__ = ["OutputPostprocessor", "choose_output", "crop", "to_pixels"]


class OutputPostprocessor:
    """Converts the outputs of one step to a frame for a sink.

    Args:
        contract: contract of the model.
        sink: takes pixels or tensors; not written to.
        replace_non_finite: pixels show NaN and Inf as 0; otherwise they raise an error.

    Attributes:
        output: the output of the model that the sink is given.

    Raises:
        OutputError: the model has no output that the sink takes.
    """

    def __init__(self, contract: StepContract, sink: Sink, *, replace_non_finite: bool = False) -> None:
        self.output = choose_output(contract, sink)
        self._pixels, self._replace = sink.takes_pixels, replace_non_finite

    def __call__(self, outputs: Mapping[str, NDArray[Any]], preprocessor: Preprocessor) -> NDArray[Any]:
        """The frame: pixels (H, W, C) uint8; else a picture (C, H, W) without the padding, or the tensor itself.

        Args:
            outputs: outputs of one stream, by name, with a batch of one.
            preprocessor: preprocessor of the same stream, for the size of its frames.

        Raises:
            StepcellError: pixels of NaN or Inf, unless these are replaced.
        """
        tensor = outputs[self.output.name]
        if not is_image(self.output):
            return tensor[0] if tensor.ndim and len(tensor) == 1 else tensor
        tensor = crop(tensor, preprocessor.size, preprocessor.padded)
        if not self._pixels:
            return tensor
        if self._replace:
            tensor = np.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)
        return to_pixels(self.output, tensor)


def choose_output(contract: StepContract, sink: Sink) -> TensorSpec:
    """The first output that is a picture; for a sink of tensors, the first output if none is a picture.

    Raises:
        OutputError: the sink takes pixels and no output is a picture.
    """
    pictures = [spec for spec in contract.outputs if is_image(spec)]
    if pictures:
        return pictures[0]
    if sink.takes_pixels or not contract.outputs:
        names = ", ".join(f"{spec.name} {spec.shape}" for spec in contract.outputs)
        raise OutputError(
            f"{sink.name}: no output of this model is a picture (layout NCHW, 1 or 3 channels): {names or 'none'}",
            hint="--output out.npy writes the tensors themselves",
        )
    return contract.outputs[0]


def crop(output: NDArray[Any], size: tuple[int, int], padded: tuple[int, int]) -> NDArray[Any]:
    """(1, C, H', W') -> (C, H, W) without the padding of the input; the model may scale the size.

    Args:
        output: output of the model.
        size: (height, width) of the frame.
        padded: (height, width) of the input tensor.
    """
    height, width = (-(-out * inner // outer) for out, inner, outer in zip(output.shape[2:], size, padded, strict=True))
    return output[0, :, :height, :width]


def to_pixels(spec: TensorSpec, tensor: NDArray[Any]) -> NDArray[np.uint8]:
    """A picture (C, H, W) as pixels (H, W, C) uint8: inverse scaling, clipped to 0..255, rounded.

    Raises:
        StepcellError: the tensor holds NaN or Inf.
    """
    channels, height, width = tensor.shape
    if not np.isfinite(tensor).all():
        raise StepcellError(
            f"{spec.name}: the model returned NaN or Inf",
            hint="its states may be corrupted: --reset-every N clears them; float16 models overflow beyond 65504",
        )
    gain, offset = gain_and_offset(spec, channels)
    values = np.subtract(tensor, offset, dtype=np.float32)
    values *= (1 / gain).astype(np.float32)
    np.clip(values, 0, 255, out=values)
    np.rint(values, out=values)
    pixels = np.empty((height, width, channels), np.uint8)
    np.copyto(pixels.transpose(2, 0, 1), values, casting="unsafe")
    return pixels
