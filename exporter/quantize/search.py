"""Search for the recipe and for the layers to keep in float32, by the error of the whole model over fed-back steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stepcell.contract import StepContract
from stepcell.errors import ParityError
from stepcell.exporter.quantize.calibrate import Calibration
from stepcell.exporter.quantize.clip_runs import Arrays, clip_steps, held_out_from
from stepcell.exporter.quantize.flat_graph import FlatGraph
from stepcell.exporter.quantize.qdq import Quantizer
from stepcell.pixels import is_quantity
from stepcell.runtime.verify.clips import Clip

__all__ = ["EQUALIZATIONS", "QUANTILES", "Candidate", "Losses", "find_layers"]

QUANTILES = (1.0, 0.9999, 0.9995)
EQUALIZATIONS = (0.5, 1.0)
_TABLE = 12  # rows of the table in a refusal


class Losses:
    """Measures int8 models against the float32 model: outputs over the last quarter of every clip.

    States are fed back from the first frame on in both. Labels and booleans are not measured; a model of nothing else
    is measured by its states.
    """

    def __init__(self, graph: FlatGraph, contract: StepContract, clips: Sequence[Clip]) -> None:
        self._contract, self._clips = contract, clips
        # The mean of a picture of bytes only shows NaN; the picture is measured.
        means = tuple(f"{spec.name}.mean" for spec in contract.outputs if spec.converts)
        measured = [
            spec.name
            for spec in contract.outputs
            if (spec.dtype.startswith("float") or is_quantity(spec)) and not spec.name.startswith(means)
        ]
        self._names = measured or [state.output for state in contract.states]
        self._expected = list(self._run(graph.model.SerializeToString()))
        self._deviations = {
            name: float(np.std(np.concatenate([each[name].ravel() for each in self._expected]), dtype=np.float64))
            for name in self._names
        }

    def of(self, data: bytes) -> dict[str, float]:
        """By output, rms of the difference relative to the standard deviation of the float32 output."""
        squares = dict.fromkeys(self._names, 0.0)
        count = 0
        for expected, found in zip(self._expected, self._run(data), strict=True):
            count += 1
            for name in self._names:
                squares[name] += float(np.mean(np.square(np.subtract(found[name], expected[name], dtype=np.float64))))
        return {name: (squares[name] / count) ** 0.5 / (self._deviations[name] or 1.0) for name in self._names}

    def psnr(self, loss: Mapping[str, float]) -> dict[str, float]:
        """In dB against the float32 output, of the outputs whose range is known."""
        found = {}
        for spec in self._contract.outputs:
            low, high = spec.range or ((0.0, 255.0) if spec.dtype == "uint8" else (0.0, 0.0))
            rms = loss.get(spec.name, 0.0) * (self._deviations.get(spec.name) or 1.0)
            if high > low and rms > 0:
                found[spec.name] = 20 * math.log10((high - low) / rms)
        return found

    def _run(self, data: bytes) -> list[Arrays]:
        steps = clip_steps(data, self._contract, self._clips)
        return [
            {name: arrays[name] for name in self._names}
            for number, frame, arrays in steps
            if frame >= held_out_from(self._clips[number])
        ]


@dataclass(frozen=True)
class Candidate:
    """A quantised model.

    Attributes:
        layers: names of its int8 convolutions.
        loss: as of `Losses.of`.
    """

    quantile: float
    equalization: float
    layers: tuple[str, ...]
    loss: dict[str, float]
    data: bytes

    @property
    def worst(self) -> float:
        """The loss of the output that loses most; not a number counts as infinite."""
        return max((each if each == each else float("inf") for each in self.loss.values()), default=0.0)


def find_layers(
    graph: FlatGraph,
    calibration: Calibration,
    losses: Losses,
    *,
    keep: Collection[str],
    max_loss: float,
    progress: Callable[[str], None],
) -> Candidate:
    """The int8 model with the best recipe, and with as many int8 layers as `max_loss` allows.

    Layers are given back to float32 one after another, first the one without which the square of the loss falls most
    for each multiplication that is no longer in int8.

    Args:
        keep: layers that stay in float32 in any case.
        progress: called with a line for every stage.

    Raises:
        ParityError: the loss is larger with any layer in int8; the message has what each one costs.
    """
    quantizer = Quantizer(graph, calibration)

    def candidate(quantile: float, equalization: float, layers: Collection[str]) -> Candidate:
        data = quantizer.model(quantile, layers, equalization).SerializeToString()
        return Candidate(quantile, equalization, tuple(layers), losses.of(data), data)

    names = [name for name in graph.convolutions if name not in keep]
    tried = [candidate(quantile, power, names) for quantile in calibration.ranges for power in EQUALIZATIONS]
    best = min(tried, key=lambda each: each.worst)
    progress(
        f"{len(tried)} recipes tried: the {_text(best.quantile)} of every channel, equalization {best.equalization:g}; "
        f"loss {best.worst:.2%} with all {len(names)} layers in int8"
    )
    if best.worst <= max_loss:
        return best
    without = {}
    for name in names:
        rest = [other for other in names if other != name]
        without[name] = candidate(best.quantile, best.equalization, rest).worst
    order = sorted(names, key=lambda name: (without[name] ** 2 - best.worst**2) / calibration.work[name])
    for count in range(1, len(order)):
        layers = [name for name in names if name not in order[:count]]
        found = candidate(best.quantile, best.equalization, layers)
        progress(f"{order[count - 1]} stays in float32: loss {found.worst:.2%}")
        if found.worst <= max_loss:
            return found
    raise ParityError(
        f"a loss of {100 * max_loss:.3g}% cannot be held with any of {len(names)} layers in int8; with all of them it "
        f"is {best.worst:.2%}, and " + _costs(without, order),
        hint="--max-loss F allows more; more clips that look like those of the stream calibrate better",
    )


def _costs(without: Mapping[str, float], order: Sequence[str]) -> str:
    rows = [f"without {name} {without[name]:.2%}" for name in order[:_TABLE]]
    return ", ".join(rows) + (f", and {len(order) - _TABLE} more" if len(order) > _TABLE else "")


def _text(quantile: float) -> str:
    return "largest value" if quantile == 1 else f"{quantile:g} quantile"
