"""Which output of a model a sink is given, and in which form."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import OutputError
from stepcell.runtime.media.preprocess import FrameAdapter, is_image
from stepcell.runtime.media.sinks import Sink

__all__ = ["choose_output", "result_of"]


def choose_output(contract: StepContract, sink: Sink) -> TensorSpec:
    """The first picture; for an array, the first output where none is a picture.

    Raises:
        OutputError: the sink takes pictures and there is none.
    """
    pictures = [spec for spec in contract.outputs if is_image(spec)]
    if pictures:
        return pictures[0]
    if sink.takes_pixels or not contract.outputs:
        names = ", ".join(f"{spec.name} {spec.shape}" for spec in contract.outputs)
        raise OutputError(
            f"{sink.name}: no output of this model is a picture (layout NCHW, 1 or 3 channels): {names or 'none'}",
            hint="--output out.npy takes the model's own numbers",
        )
    return contract.outputs[0]


def result_of(spec: TensorSpec, output: NDArray[Any], adapter: FrameAdapter) -> NDArray[Any]:
    """One stream's result without its batch: a picture (C, H, W) without the padding, or as it is."""
    if is_image(spec):
        return adapter.crop(output)
    return output[0] if output.ndim and len(output) == 1 else output
