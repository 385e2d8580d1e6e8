"""Runs of a model over clips with its states fed back, from the initial states at the first frame of each clip."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.runtime.verify.clips import Clip
from stepcell.runtime.verify.stepper import initial_states

__all__ = ["Arrays", "clip_steps", "held_out_from", "states_after", "steps"]

Arrays = dict[str, NDArray[Any]]


def clip_steps(data: bytes, contract: StepContract, clips: Sequence[Clip]) -> Iterator[tuple[int, int, Arrays]]:
    """Number of the clip, number of the frame, and all that the step takes and returns, by name in the graph.

    Args:
        data: a model with the inputs and outputs of the contract, and any further outputs.
    """
    session = OnnxSession(data, "the model")
    for number, clip in enumerate(clips):
        for frame, arrays in steps(session, contract, clip, range(len(clip))):
            yield number, frame, arrays


def steps(
    session: OnnxSession, contract: StepContract, clip: Clip, frames: Iterable[int], states: Arrays | None = None
) -> Iterator[tuple[int, Arrays]]:
    """Number of the frame, and all that the step takes and returns, for these frames of a clip one after another.

    Args:
        states: before the first frame, by name of the input; None: the initial ones.
    """
    for frame in frames:
        inputs = {
            spec.name: np.asarray(clip[frame][spec.name], spec.dtype)
            if spec.name in clip[frame]
            else spec.filled(tuple(1 if isinstance(dim, str) else dim for dim in spec.shape))
            for spec in contract.inputs
        }
        if states is None:
            initial = initial_states(contract, inputs)
            states = {state.input: initial[state.name] for state in contract.states}
        found = session({**inputs, **states})
        yield frame, {**inputs, **states, **found}
        states = states_after(contract, found)


def states_after(contract: StepContract, arrays: Arrays) -> Arrays:
    """The states for the next step, by name of the input, from what a step returned."""
    return {state.input: arrays[state.output] for state in contract.states}


def held_out_from(clip: Clip) -> int:
    """The first frame of the last quarter of a clip, which is not calibrated on."""
    return len(clip) - len(clip) // 4
