"""Small models whose arithmetic can be done in the head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from stepcell.contract import METADATA_KEY, Spec, StateSpec, StepContract, TensorSpec


def write_model(path: Path, contract: StepContract, nodes: list[onnx.NodeProto], **graph: Any) -> Path:
    """An ONNX file whose graph has the inputs and outputs of the contract, and the contract in it."""

    def infos(specs: dict[str, Spec]) -> list[onnx.ValueInfoProto]:
        kinds = {name: helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)) for name, spec in specs.items()}
        return [helper.make_tensor_value_info(name, kinds[name], spec.shape) for name, spec in specs.items()]

    body = helper.make_graph(nodes, "test", infos(contract.graph_inputs), infos(contract.graph_outputs), **graph)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, contract.to_json()
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def accumulator(tmp_path: Path) -> Callable[..., Path]:
    """Makes models of y = h' = h + x; keywords change the specs of x, y and h."""

    def make(
        name: str = "sum.onnx",
        *,
        shape: tuple[int | str, ...] = ("batch", 3, "height", "width"),
        dtype: Any = "float32",
        layout: str | None = "NCHW",
        **image: Any,
    ) -> Path:
        contract = StepContract(
            inputs=(TensorSpec(name="x", shape=shape, dtype=dtype, layout=layout, **image),),
            outputs=(TensorSpec(name="y", shape=shape, dtype=dtype, layout=layout, **image),),
            states=(StateSpec(name="h", shape=shape, dtype=dtype),),
            precision="float16" if dtype == "float16" else "float32",
        )
        nodes = [
            helper.make_node("Add", ["state_in.h", "x"], ["y"]),
            helper.make_node("Identity", ["y"], ["state_out.h"]),
        ]
        return write_model(tmp_path / name, contract, nodes)

    return make
