"""Arithmetic of the parity checks: files with float16 are computed as written, all others in ONNX Runtime.

ONNX Runtime's CPU provider computes float16 in float32 and drops casts (findings/ort-cpu-float16-casts.sh), so its
results show the errors of float16 weights only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import onnx

from stepcell.contract import StepContract
from stepcell.errors import EvaluationError
from stepcell.exporter.parity import CheckClip, Step, file_step
from stepcell.runtime.evaluate import program_of
from stepcell.runtime.evaluate.arithmetic import Arithmetic

__all__ = ["AS_WRITTEN", "IN_ONNX_RUNTIME", "evaluated_step", "holds_float16"]

logger = logging.getLogger(__name__)

AS_WRITTEN = "float16 as written, accumulated in float32"
IN_ONNX_RUNTIME = "float32 in ONNX Runtime"


def holds_float16(contract: StepContract) -> bool:
    """Whether a step of the model rounds to float16."""
    return contract.precision == "float16" or any(state.dtype == "float16" for state in contract.states)


def evaluated_step(
    data: bytes,
    arithmetic: Arithmetic,
    contract: StepContract,
    clip: CheckClip,
    inputs: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
) -> Step | None:
    """A file as a step that the evaluator computes.

    Args:
        data: the serialised model.
        clip: the evaluator is tried on its first frame.
        inputs, outputs: as in `file_step`.

    Returns:
        None, with a warning, if the file contains an operator that the evaluator does not support.
    """
    try:
        step = file_step(program_of(onnx.load_model_from_string(data), arithmetic).run, contract, inputs, outputs)
        step(next(iter(clip)), clip.states)
    except EvaluationError as error:
        logger.warning(f"{error.message}; the file is checked in ONNX Runtime, whose float16 is float32 on a CPU")
        return None
    return step
