"""Fp16 mirrors of float32 states: names, layout and conversion, as the step loop needs them.

The convolutions of a step read h in float16, and y of the last step is exactly that: a mirror of the new state.
An engine with the plugin returns it and takes it back as an additional output and input, so no kernel has to
convert the state. The contract does not mention mirrors; code that writes a state must update its mirror too.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.contract import Spec, StepContract
from stepcell.plugins.kernels.cell_config import padded

__all__ = ["Fp16Mirror", "engine_tensors", "half_map", "half_shape"]


class Fp16Mirror(msgspec.Struct, frozen=True):
    """An input and an output of an engine that hold a state rounded to float16, in the format kHWC8.

    Attributes:
        state: name of the state in the contract.
        input, output: names of the two tensors.
    """

    state: str
    input: str
    output: str


def half_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Memory shape of a (B, C, H, W) map in kHWC8: (B, H, W, C rounded up to 8)."""
    batch, channels, height, width = shape
    return batch, height, width, padded(channels)


def half_map(array: NDArray[np.float32]) -> NDArray[np.float16]:
    """Convert a float32 map (B, C, H, W) to float16 in the layout of `half_shape`, with zeros as padding.

    Rounds as the kernels do: to the nearest value, and to infinity beyond the range of float16.
    """
    result = np.zeros(half_shape(array.shape), np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        result[..., : array.shape[1]] = array.transpose(0, 2, 3, 1)
    return result


def engine_tensors(contract: StepContract, mirrors: Sequence[Fp16Mirror]) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """Inputs and outputs of an engine by name: the contract's tensors, then the fp16 mirrors of its states."""
    inputs, outputs = contract.graph_inputs, contract.graph_outputs
    states = {state.name: msgspec.structs.replace(state, dtype="float16") for state in contract.states}
    for mirror in mirrors:
        if mirror.state in states:
            inputs[mirror.input] = outputs[mirror.output] = states[mirror.state]
    return inputs, outputs
