"""GraphEvaluator: one step of an exported model in numpy, computed as the ONNX standard says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from stepcell.contract import Spec, StepContract
from stepcell.errors import ContractError, EvaluationError, InputError, StateError, UsageError
from stepcell.library_errors import library_errors
from stepcell.onnx_model import contract_text, missing_contract, read_onnx
from stepcell.optional_imports import require
from stepcell.runtime.evaluate.arithmetic import Arithmetic, Array, Widening, is_float
from stepcell.runtime.evaluate.program import Program

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["GraphEvaluator", "program_of"]

Arrays = dict[str, Array]


def program_of(model: ModelProto, arithmetic: Arithmetic = "as_written") -> Program:
    """A model, with a contract or without, that can be evaluated: functions inlined, constants folded.

    Raises:
        EvaluationError: it holds an operator that is not implemented.
    """
    require("onnx", extra="ort", purpose="evaluating a model")
    from onnx import inliner

    if model.functions:
        model = inliner.inline_local_functions(model)
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 1)
    return Program(model.graph, opset, Widening(arithmetic))


class GraphEvaluator:
    """Steps a model in numpy.

    What a float16 model computes on a device cannot be seen in ONNX Runtime on a CPU, which
    computes it in float32 and drops its casts. This evaluator rounds where the file says so:

    - "as_written": every value has the type that the file gives it. An operator on floats of 16
      bits computes in float32, products and sums accumulated in float32, and rounds its result
      once, to nearest with ties to even.
    - "float64": every float, weights and casts included, is float64: the file without rounding,
      with the weights that it holds.
    - "float32": floats of 16 bits are float32, as in the float32 form that `StepLoop` runs on a CPU.

    Args:
        model: an ONNX file or model with a state contract; functions are inlined.
        check_file: refuse a file that has changed since its export.

    Raises:
        InputError: the file cannot be read.
        ContractError: it holds no contract, or one that does not fit its graph.
        EvaluationError: it holds an operator that is not implemented.
        UsageError: an unknown arithmetic.
        MissingDependencyError: onnx is not installed.
    """

    def __init__(
        self, model: ModelProto | str | Path, arithmetic: Arithmetic = "as_written", *, check_file: bool = True
    ) -> None:
        require("onnx", extra="ort", purpose="evaluating a model")
        self.name = "model"
        if isinstance(model, (str, Path)):
            self.name = str(model)
            file = read_onnx(Path(model), check=check_file)
            model, self.contract = file.model, file.contract
        else:
            text = contract_text(model)
            if text is None:
                raise missing_contract(self.name)
            self.contract = StepContract.from_json(text, subject=f"{self.name}: contract", check=False)
        self.arithmetic: Arithmetic = arithmetic
        self._widening = Widening(arithmetic)
        with library_errors(self.name, EvaluationError, what="cannot be evaluated"):  # such as damaged constants
            self._program = program_of(model, arithmetic)
        for kind, ours, graph in (
            ("inputs", self.contract.graph_inputs, self._program.inputs),
            ("outputs", self.contract.graph_outputs, self._program.outputs),
        ):
            if set(ours) != set(graph):
                raise ContractError(
                    f"{self.name}: {kind} of the graph and of the contract differ: {graph}, {list(ours)}"
                )

    def initial_states(self, shapes: Mapping[str, Sequence[int]]) -> Arrays:
        """Every state before the first step, for data inputs of these shapes, in the type of this arithmetic.

        Raises:
            InputError: an input is missing, unknown or of a shape that does not fit.
        """
        sizes = self.contract.state_shapes(self.contract.bind(shapes))
        return {
            state.name: state.initial(sizes[state.name]).astype(self._widening.of(np.dtype(state.dtype)))
            for state in self.contract.states
        }

    def step(self, inputs: Mapping[str, ArrayLike], states: Mapping[str, ArrayLike]) -> tuple[Arrays, Arrays]:
        """One step.

        Args:
            inputs: data inputs by name; floats of another width are rounded to that of the graph.
            states: by name.

        Returns:
            Data outputs and new states, by name.

        Raises:
            InputError, StateError: a name is missing or unknown, or an array is of another shape.
        """
        feeds = self._feeds(inputs, states)
        return self._split(self._program.run(feeds), feeds)

    def jvp(
        self,
        inputs: Mapping[str, ArrayLike],
        states: Mapping[str, ArrayLike],
        state_tangents: Mapping[str, ArrayLike],
    ) -> tuple[Arrays, Arrays, Arrays, Arrays]:
        """One step and its derivative in a direction of the states, by forward-mode differentiation.

        The data inputs do not change. Rounding and comparisons have no derivative.

        Args:
            state_tangents: by state, of its shape; a state that is absent does not change.

        Returns:
            Outputs and new states as `step` returns them, and the derivative of each.

        Raises:
            UsageError: the arithmetic is not "float64".
            InputError, StateError: as for `step`.
        """
        if self.arithmetic != "float64":
            raise UsageError(f"jvp: expected a model evaluated in 'float64', this one is in {self.arithmetic!r}")
        feeds = self._feeds(inputs, states)
        tangents: Arrays = {}
        for state in self.contract.states:
            if state.name in state_tangents:
                tangent = np.asarray(state_tangents[state.name], np.float64)
                if tangent.shape != feeds[state.input].shape:
                    raise StateError(
                        f"{state.name}: expected a tangent of shape {feeds[state.input].shape}, got {tangent.shape}"
                    )
                tangents[state.input] = tangent
        unknown = set(state_tangents) - {state.name for state in self.contract.states}
        if unknown:
            raise StateError(f"state_tangents: no state is called {', '.join(sorted(unknown))}")
        results, changes = self._program.run_jvp(feeds, tangents)
        whole = {
            name: np.zeros_like(value) if changes[name] is None else changes[name] for name, value in results.items()
        }
        return (*self._split(results, feeds), *self._split(whole, tangents))

    def _feeds(self, inputs: Mapping[str, ArrayLike], states: Mapping[str, ArrayLike]) -> Arrays:
        contract = self.contract
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        symbols = contract.bind({name: array.shape for name, array in arrays.items()})
        if set(states) != {state.name for state in contract.states}:
            wanted = ", ".join(state.name for state in contract.states)
            raise StateError(f"states: expected {wanted or 'none'}, got {', '.join(states) or 'none'}")
        shapes = contract.state_shapes(symbols)
        feeds = {spec.name: _as(spec, arrays[spec.name]) for spec in contract.inputs}
        for state in contract.states:
            array = _as(state, np.asarray(states[state.name]))
            if array.shape != shapes[state.name]:
                raise StateError(f"{state.name}: expected shape {shapes[state.name]}, got {array.shape}")
            feeds[state.input] = array
        return feeds

    def _split(self, results: Mapping[str, Any], feeds: Arrays) -> tuple[Arrays, Arrays]:
        """Data outputs and states, by name; an input or a constant that is a result itself is copied."""
        fed = [id(array) for array in feeds.values()]
        own = {
            name: np.array(value) if value.base is not None or not value.flags.writeable or id(value) in fed else value
            for name, value in results.items()
        }
        outputs = {spec.name: own[spec.name] for spec in self.contract.outputs}
        return outputs, {state.name: own[state.output] for state in self.contract.states}


def _as(spec: Spec, array: Array) -> Array:
    """An array of the kind that the contract says: floats for floats."""
    if is_float(array.dtype) != is_float(np.dtype(spec.dtype)):
        raise InputError(f"{spec.name}: expected {spec.dtype}, got {array.dtype}")
    return array
