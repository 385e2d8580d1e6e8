"""A step model of one line whose results can be computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.exporter.step_onnx.graph import embed_contract

__all__ = ["SMOOTHING", "smoother", "written"]

SMOOTHING = 0.71  # so that few results lie half-way between two levels, where float32 and float64 may round apart


def smoother(
    layout: str = "NCHW", channels: int = 3, pool: int = 1, opset: int = 20, **pixels: Any
) -> tuple[onnx.ModelProto, StepContract]:
    """h' = 0.71 h + 0.29 x, y = h' in means of `pool` x `pool`; the range of y is that of x without mean and std."""
    sizes = {"N": "batch", "C": channels, "H": "height", "W": "width"}
    shape = tuple(sizes[letter] for letter in layout)
    halved = tuple(f"{dim} // {pool}" if pool > 1 and letter in "HW" else dim for letter, dim in sizes.items())
    nodes = [
        helper.make_node("Mul", ["state_in.h", "old"], ["kept"]),
        helper.make_node("Mul", ["x", "new"], ["taken"]),
        helper.make_node("Add", ["kept", "taken"], ["state_out.h"]),
        helper.make_node("AveragePool", ["state_out.h"], ["y"], kernel_shape=[pool] * 2, strides=[pool] * 2)
        if pool > 1
        else helper.make_node("Identity", ["state_out.h"], ["y"]),
    ]
    dtype, order = pixels.pop("dtype", "float32"), pixels.pop("order", "RGB" if channels == 3 else None)
    weights = [
        numpy_helper.from_array(np.array(value, dtype), name)
        for name, value in (("old", SMOOTHING), ("new", 1 - SMOOTHING))
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", "state_in.h")]
    outputs = [
        helper.make_tensor_value_info("y", kind, halved if pool > 1 else shape),
        helper.make_tensor_value_info("state_out.h", kind, shape),
    ]
    graph = helper.make_graph(nodes, "smoother", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    x = TensorSpec(name="x", shape=shape, layout=layout, dtype=dtype, channels=order, **{"range": (0.0, 1.0), **pixels})
    y = TensorSpec(
        name="y", shape=halved if pool > 1 else shape, layout=layout, dtype=dtype, range=x.range, channels=x.channels
    )
    contract = StepContract(
        inputs=(x,),
        outputs=(y,),
        states=(StateSpec(name="h", shape=shape, dtype=dtype),),
        example={"batch": 1, "height": 16, "width": 24},
    )
    return model, embed_contract(model, contract)


def written(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path
