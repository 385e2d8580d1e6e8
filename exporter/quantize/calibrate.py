"""Calibration: what the values of a model are while it runs over real clips."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.quantize.clip_runs import Arrays, held_out_from, states_after, steps
from stepcell.exporter.quantize.flat_graph import Convolution, FlatGraph
from stepcell.runtime.verify.clips import Clip

__all__ = ["SETTLED", "Calibration", "Moments", "Ranges", "calibrate"]

SETTLED = 1000  # steps of a clip, after which states that change slowly are near their final values
_SAMPLE = 8192  # values of a channel in a frame that a quantile is taken of, evenly over it
_PATCHES = 128  # of a frame, that moments are taken of
_LARGEST = 4608  # values of a patch; the moments of larger ones take too much memory

# By name of the tensor: for each channel the largest, over the frames, of a quantile of the absolute values of the
# channel in the frame.
Ranges = dict[str, NDArray[np.float32]]


@dataclass
class Moments:
    """Moments of the patches that a convolution multiplies by its weights, padding included, for each group.

    Attributes:
        mean: (groups, values), values in the order of the weights: input channel of the group, kernel.
        square: (groups, values, values), mean of the products of two values.
        count: number of patches.
    """

    mean: NDArray[np.float64]
    square: NDArray[np.float64]
    count: int = 0

    def add(self, patches: NDArray[np.float32]) -> None:
        """Take in patches (groups, n, values)."""
        self.count += (n := patches.shape[1])
        self.mean += (patches.mean(1) - self.mean) * (n / self.count)
        self.square += (patches.transpose(0, 2, 1) @ patches / np.float32(n) - self.square) * (n / self.count)


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        ranges: by quantile; 1 is the largest value.
        moments: by convolution, where they can be taken.
        work: by convolution, number of multiplications in a step.
    """

    ranges: dict[float, Ranges]
    moments: dict[str, Moments]
    work: dict[str, int]


def calibrate(
    graph: FlatGraph, contract: StepContract, clips: Sequence[Clip], quantiles: Sequence[float]
) -> Calibration:
    """Run the float32 model over the first three quarters of every clip, with its states fed back.

    Values are measured twice: from the initial states on, and once more after the clip has gone to and fro for
    `SETTLED` steps. States that change slowly have other values then, and a stream runs for weeks.
    """
    measured = _Measured(graph, quantiles)
    watched = OnnxSession(measured.watched_model(), "the model")
    plain = OnnxSession(graph.model.SerializeToString(), "the model")
    for clip in clips:
        frames = range(held_out_from(clip))
        states = measured.add_steps(steps(watched, contract, clip, frames), contract)
        count = max(0, SETTLED - len(frames)) if contract.states else 0
        further = list(itertools.islice(itertools.cycle([*reversed(frames), *frames]), count))
        for _, arrays in steps(plain, contract, clip, further, states):
            states = states_after(contract, arrays)
        if further:
            measured.add_steps(steps(watched, contract, clip, further[::-1][: len(frames)], states), contract)
    return measured.found


class _Measured:
    """Takes in what steps take and return, and measures what quantisation asks of it."""

    def __init__(self, graph: FlatGraph, quantiles: Sequence[float]) -> None:
        self._graph = graph
        self._tensors = sorted({each for conv in graph.convolutions.values() for each in (conv.input, conv.ranged)})
        self._rng = np.random.default_rng(0)
        self.found = Calibration({quantile: {} for quantile in quantiles}, {}, {})

    def watched_model(self) -> bytes:
        """The model with the tensors that are measured as further outputs."""
        watched = onnx.ModelProto()
        watched.CopyFrom(self._graph.model)
        known = {value.name for value in (*watched.graph.output, *watched.graph.input)}
        watched.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in self._tensors
            if name not in known
        )
        return bytes(watched.SerializeToString())

    def add_steps(self, run: Iterable[tuple[int, Arrays]], contract: StepContract) -> Arrays:
        """Take in a run of at least one step; returns the states after it."""
        for _, arrays in run:
            self._add(arrays)
        return states_after(contract, arrays)

    def _add(self, arrays: Arrays) -> None:
        for name in self._tensors:
            values = np.abs(arrays[name])
            channels = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
            sample = channels[:, :: -(-channels.shape[1] // _SAMPLE)]
            for quantile, ranges in self.found.ranges.items():
                largest = channels.max(1) if quantile == 1 else np.quantile(sample, quantile, axis=1)
                before = ranges.get(name, np.zeros(len(channels), np.float32))
                ranges[name] = np.maximum(before, largest.astype(np.float32))
        for conv in self._graph.convolutions.values():
            x = arrays[conv.input]
            strides = next((each.ints for each in conv.node.attribute if each.name == "strides"), [1])
            self.found.work[conv.name] = conv.weight.size * math.prod((len(x), *x.shape[2:])) // math.prod(strides)
            patches = _patches(conv, x, self._rng)
            if patches is None:
                continue
            if conv.name not in self.found.moments:
                groups, _, values_of_one = patches.shape
                square = np.zeros((groups, values_of_one, values_of_one))
                self.found.moments[conv.name] = Moments(np.zeros((groups, values_of_one)), square)
            self.found.moments[conv.name].add(patches)


def _patches(conv: Convolution, x: NDArray[Any], rng: np.random.Generator) -> NDArray[np.float32] | None:
    """Patches (groups, n, values) of an input (N, C, spatial...) at random positions; None: they cannot be taken."""
    given = {each.name: onnx.helper.get_attribute_value(each) for each in conv.node.attribute}
    kernel, axes = conv.weight.shape[2:], conv.weight.ndim - 2
    if given.get("auto_pad", b"NOTSET") != b"NOTSET" or conv.weight[0].size > _LARGEST:
        return None
    pads, strides = given.get("pads", [0] * 2 * axes), given.get("strides", [1] * axes)
    dilations, groups = given.get("dilations", [1] * axes), given.get("group", 1)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)])
    index: list[Any] = [rng.integers(0, len(x), _PATCHES).reshape(-1, *[1] * axes)]
    for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        count = (padded.shape[2 + axis] - dilation * (size - 1) - 1) // stride + 1
        starts = stride * rng.integers(0, count, _PATCHES)
        taps = starts[:, None] + dilation * np.arange(size)
        index.append(taps.reshape(-1, *[size if each == axis else 1 for each in range(axes)]))
    taken = padded[(index[0], slice(None), *index[1:])]  # (n, kernel..., C)
    by_channel = np.moveaxis(taken, -1, 1).reshape(_PATCHES, groups, -1)
    return np.ascontiguousarray(by_channel.transpose(1, 0, 2), np.float32)
