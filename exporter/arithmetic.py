"""Arithmetic of the parity checks: files with float16 are computed as written, all others in ONNX Runtime.

ONNX Runtime's CPU provider computes float16 in float32 and drops casts (findings/ort-cpu-float16-casts.sh), so its
results show the errors of float16 weights only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.errors import EvaluationError
from stepcell.exporter.parity import Arrays, CheckClip, Step, file_step, tensor_names
from stepcell.runtime.evaluate import program_of
from stepcell.runtime.evaluate.arithmetic import Arithmetic

__all__ = ["AS_WRITTEN", "IN_ONNX_RUNTIME", "EvaluatedFile", "evaluated_step", "holds_float16"]

logger = logging.getLogger(__name__)

AS_WRITTEN = "float16 as written, accumulated in float32"
IN_ONNX_RUNTIME = "float32 in ONNX Runtime"


def holds_float16(contract: StepContract) -> bool:
    """Whether a step of the model rounds to float16."""
    return contract.precision == "float16" or any(state.dtype == "float16" for state in contract.states)


class EvaluatedFile:
    """A file as a step that the evaluator computes, with its derivative in float64.

    Args:
        data: the serialised model.
        inputs, outputs: as in `file_step`.

    Raises:
        EvaluationError: it contains an operator that the evaluator does not have; also from `step` and `jvp`.
    """

    def __init__(
        self,
        data: bytes,
        arithmetic: Arithmetic,
        contract: StepContract,
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
    ) -> None:
        self.contract = contract
        self._program = program_of(onnx.load_model_from_string(data), arithmetic)
        self._inputs, self._outputs = tensor_names(contract, inputs, outputs)
        self.step = file_step(self._program.run, contract, inputs, outputs)

    def jvp(
        self,
        inputs: Mapping[str, NDArray[Any]],
        states: Mapping[str, NDArray[Any]],
        tangents: Mapping[str, NDArray[Any]],
    ) -> tuple[Arrays, Arrays, Arrays, Arrays]:
        """Outputs and new states, and their derivatives along a change of the states; only in float64."""
        feeds = {**inputs, **{self._inputs[name]: array for name, array in states.items()}}
        values, found = self._program.run_jvp(feeds, {self._inputs[name]: each for name, each in tangents.items()})
        changes = {name: np.zeros_like(values[name]) if each is None else each for name, each in found.items()}
        return (*self._split(values), *self._split(changes))

    def _split(self, results: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
        outputs = {spec.name: results[spec.name] for spec in self.contract.outputs}
        return outputs, {name: results[target] for name, target in self._outputs.items()}


def evaluated_step(
    data: bytes,
    arithmetic: Arithmetic,
    contract: StepContract,
    clip: CheckClip,
    inputs: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
) -> Step | None:
    """The step of an `EvaluatedFile`; None, with a warning, where the evaluator cannot compute it.

    Args:
        clip: tried on its first frame.
    """
    try:
        step = EvaluatedFile(data, arithmetic, contract, inputs, outputs).step
        step(next(iter(clip)), clip.states)
    except EvaluationError as error:
        logger.warning(f"{error.message}; the file is checked in ONNX Runtime, whose float16 is float32 on a CPU")
        return None
    return step
