"""Evaluation of single-step ONNX files in numpy, with the rounding that the file asks for."""

from stepcell.runtime.evaluate.evaluator import GraphEvaluator, program_of

__all__ = ["GraphEvaluator", "program_of"]
