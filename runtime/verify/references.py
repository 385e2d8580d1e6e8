"""References computed here: the graph of an ONNX file in float64, or as the ONNX standard computes it."""

from __future__ import annotations

from pathlib import Path

from stepcell.runtime.evaluate import GraphEvaluator
from stepcell.runtime.verify.stepper import FunctionStepper

__all__ = ["as_written", "in_float64"]


def as_written(path: Path) -> FunctionStepper:
    """The file as the ONNX standard computes it: rounded wherever it says float16."""
    evaluator = GraphEvaluator(path, check_file=False)  # `stepcell verify` has checked it
    return FunctionStepper(evaluator.step, evaluator.contract, f"{path.name} as written")


def in_float64(path: Path) -> FunctionStepper:
    """The file's graph and weights, computed in float64."""
    evaluator = GraphEvaluator(path, "float64", check_file=False)
    return FunctionStepper(evaluator.step, evaluator.contract, f"{path.name} in float64", jvp=evaluator.jvp, wide=True)
