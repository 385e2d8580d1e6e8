"""The fp16 mirror of a float32 state as tensors of an engine, so that no kernel has to make it.

The convolutions of a step read a fp16 mirror of h, and y of the step before is that copy. In an engine with the
plugin it comes back as the state does: an input and an output more, which the step loop gives two buffers as it
does for the state. A cell whose h is another cell's h_next takes that cell's y within the graph. The contract
knows nothing of it: the copy follows from the state, to which whoever writes a state must hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.contract import Spec, StateSpec, StepContract
from stepcell.plugins.kernels.cell_config import padded

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__ = ["Fp16Mirror", "add_fp16_mirrors", "all_nodes", "engine_tensors", "half_map", "half_shape"]

_HALF = 10  # onnx.TensorProto.DataType
_IN, _OUT = "half_in.", "half_out."


class Fp16Mirror(msgspec.Struct, frozen=True):
    """An input and an output of an engine that its contract does not have: float16, kHWC8, the state's shape.

    Attributes:
        state: name of the state in the contract.
        input, output: what the two ends are called; before a step the input is the state rounded to float16,
            after it the output is.
    """

    state: str
    input: str
    output: str


def half_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """How a (B, C, H, W) map lies in kHWC8: (B, H, W, C rounded up to 8)."""
    batch, channels, height, width = shape
    return batch, height, width, padded(channels)


def half_map(array: NDArray[np.float32]) -> NDArray[np.float16]:
    """(B, C, H, W) in float32 -> float16 as `half_shape`, padding channels 0, rounded as the kernels round:
    to the nearest, and to infinity beyond float16.
    """
    result = np.zeros(half_shape(array.shape), np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        result[..., : array.shape[1]] = array.transpose(0, 2, 3, 1)
    return result


def engine_tensors(contract: StepContract, copies: Sequence[Fp16Mirror]) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """What an engine takes and returns, by name: the contract's tensors, then the fp16 mirrors of its states."""
    inputs, outputs = contract.graph_inputs, contract.graph_outputs
    states = {state.name: msgspec.structs.replace(state, dtype="float16") for state in contract.states}
    for copy in copies:
        if copy.state in states:
            inputs[copy.input] = outputs[copy.output] = states[copy.state]
    return inputs, outputs


def add_fp16_mirrors(
    onnx: Any, graph: GraphProto, cells: Sequence[NodeProto], states: Iterable[StateSpec]
) -> tuple[dict[str, str], tuple[Fp16Mirror, ...]]:
    """Find or make a half tensor for every h that these cells read.

    Args:
        onnx: the module.
        graph: gets an input and an output for every state that a cell reads and a cell writes, both directly.
        cells: nodes of the op with a float32 state.
        states: of the contract.

    Returns:
        the half tensor of each float32 one that has one, by name; the pairs that the graph was given.
    """
    halves = {node.output[0]: node.output[-1] for node in cells if node.output[-1]}
    inputs, outputs = ({port.name: port for port in ports} for ports in (graph.input, graph.output))
    read = {node.input[1] for node in cells} & inputs.keys()
    written = halves.keys() & outputs.keys()
    copies = []
    for state in states:
        if state.input not in read or state.output not in written or state.batch_axis != 0:
            continue
        copy = Fp16Mirror(state.name, _IN + state.name, _OUT + state.name)
        for ports, name, like in (
            (graph.input, copy.input, inputs[state.input]),
            (graph.output, copy.output, outputs[state.output]),
        ):
            port = ports.add()
            port.CopyFrom(like)
            port.name, port.type.tensor_type.elem_type = name, _HALF
        y = halves[state.output]
        # The kernel writes the copy itself, since the next step counts on zeros in its padding channels.
        _rename(graph, y, copy.output)
        if y in outputs:
            graph.node.append(onnx.helper.make_node("Identity", [copy.output], [y]))
        halves[state.output] = copy.output
        halves[state.input] = copy.input
        copies.append(copy)
    return halves, tuple(copies)


def all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """These nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from all_nodes(graph.node)


def _rename(graph: GraphProto, old: str, new: str) -> None:
    """A tensor, where it is made and wherever it is read."""
    for node in all_nodes(graph.node):
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new
