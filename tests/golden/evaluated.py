"""An exported file evaluated in float64 against its torch module in float64: one step and its derivative."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepcell.dims import resolve
from stepcell.exporter import load_checkpoint, step_model
from stepcell.exporter.step_onnx.contract import sizes_for_check
from stepcell.runtime.evaluate import GraphEvaluator
from tests.golden.cases import Case

__all__ = ["differences_in_float64"]


def differences_in_float64(case: Case, path: Path) -> tuple[float, float]:
    """Worst difference of outputs and new states, and of their derivatives, relative to the largest where above 1.

    Args:
        path: the case's checkpoint, exported in float32.
    """
    model, _, _ = step_model(load_checkpoint(case.path / "checkpoint.pth"), case.family, case.settings)
    model = copy.deepcopy(model).double().eval()
    evaluator = GraphEvaluator(path, "float64")
    contract, rng = evaluator.contract, np.random.default_rng(0)
    sizes = sizes_for_check(contract)[0]
    shapes = {spec.name: resolve(spec.shape, sizes) for spec in contract.inputs}
    inputs = {
        spec.name: rng.random(shapes[spec.name])
        if spec.dtype.startswith("float")
        else rng.integers(0, 2, shapes[spec.name]).astype(spec.dtype)
        for spec in contract.inputs
    }
    start = evaluator.initial_states(shapes)
    states = {name: rng.normal(0, 0.5, value.shape) for name, value in start.items()}
    tangents = {name: rng.normal(0, 1, value.shape) for name, value in start.items()}
    frames = [torch.from_numpy(value) for value in inputs.values()]

    def step(*hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(*frames, *hidden))

    hidden, moved = (tuple(torch.from_numpy(value) for value in arrays.values()) for arrays in (states, tangents))
    expected, derivative = torch.func.jvp(step, hidden, moved)
    outputs, new, output_tangents, new_tangents = evaluator.jvp(inputs, states, tangents)
    return (
        _worst(expected, [*outputs.values(), *new.values()]),
        _worst(derivative, [*output_tangents.values(), *new_tangents.values()]),
    )


def _worst(expected: tuple[Tensor, ...], got: list[NDArray[Any]]) -> float:
    worst = 0.0
    for tensor, value in zip(expected, got, strict=True):
        truth = tensor.detach().numpy()
        worst = max(worst, float(np.abs(value - truth).max()) / max(1.0, float(np.abs(truth).max())))
    return worst
