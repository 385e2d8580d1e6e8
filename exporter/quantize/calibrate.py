"""Calibration: how large the values of every channel become while a model runs over real clips."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.exporter.quantize.clip_runs import clip_steps, held_out_from
from stepcell.exporter.quantize.flat_graph import FlatGraph
from stepcell.runtime.verify.clips import Clip

__all__ = ["Ranges", "calibrate"]

_SAMPLE = 8192  # values of a channel in a frame that a quantile is taken of, evenly over it

# By quantile and name of the tensor: for each channel the largest, over the frames, of that quantile of the absolute
# values of the channel in the frame.
Ranges = dict[float, dict[str, NDArray[np.float32]]]


def calibrate(graph: FlatGraph, contract: StepContract, clips: Sequence[Clip], quantiles: Sequence[float]) -> Ranges:
    """Run the float32 model over the first three quarters of every clip, with its states fed back.

    Args:
        quantiles: 1 is the largest value.
    """
    tensors = sorted({each for conv in graph.convolutions.values() for each in (conv.input, conv.ranged)})
    watched = onnx.ModelProto()
    watched.CopyFrom(graph.model)
    known = {value.name for value in (*watched.graph.output, *watched.graph.input)}
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors if name not in known
    )
    ranges: Ranges = {quantile: {} for quantile in quantiles}
    for number, frame, arrays in clip_steps(watched.SerializeToString(), contract, clips):
        if frame >= held_out_from(clips[number]):
            continue
        for name in tensors:
            values = np.abs(arrays[name])
            channels = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
            sample = channels[:, :: -(-channels.shape[1] // _SAMPLE)]
            for quantile in quantiles:
                found = channels.max(1) if quantile == 1 else np.quantile(sample, quantile, axis=1)
                before = ranges[quantile].get(name, np.zeros(len(channels), np.float32))
                ranges[quantile][name] = np.maximum(before, found.astype(np.float32))
    return ranges
