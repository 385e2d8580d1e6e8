"""A model whose state shows the order of its frames, and what its streams answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from stepcell import StepLoop
from stepcell.contract import StateSpec, StepContract, TensorSpec

SHAPE = (1, 3, 2, 4)
Frames = NDArray[Any]


def order_model(path: Path, write_model: Callable[..., Path], height: Any = "height", width: Any = "width") -> Path:
    """y = h' = h / 2 + x, of pictures with values of 0 to 1: exchanged frames change the state, unlike in a sum."""
    shape: tuple[int | str, ...] = ("batch", 3, height, width)
    contract = StepContract(
        inputs=(TensorSpec(name="x", shape=shape, layout="NCHW", range=(0.0, 1.0)),),
        outputs=(TensorSpec(name="y", shape=shape, layout="NCHW", range=(0.0, 2.0)),),
        states=(StateSpec(name="h", shape=shape),),
        example={"batch": 1, "height": 2, "width": 4},
    )
    nodes = [
        helper.make_node("Mul", ["state_in.h", "half"], ["decayed"]),
        helper.make_node("Add", ["decayed", "x"], ["y"]),
        helper.make_node("Identity", ["y"], ["state_out.h"]),
    ]
    half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
    return write_model(path, contract, nodes, initializer=[half])


def clip(seed: int, count: int) -> Frames:
    """Frames (count, 1, 3, 2, 4) float32."""
    return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


def alone(model: Path, frames: Frames) -> list[NDArray[Any]]:
    """The answers of a loop that steps one stream."""
    with StepLoop.open(model, threads=1) as loop:
        return [loop.step(x=frame)["y"] for frame in frames]
