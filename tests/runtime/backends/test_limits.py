"""Models that would keep a library busy for ever are refused, with the figure and the switch."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from stepcell.errors import InputError, StepcellError, UsageError
from stepcell.limits import FIRST_STEP_SECONDS, NODES, within_seconds
from stepcell.model_size import inlined_nodes
from stepcell.onnx_model import read_model
from stepcell.runtime.loop.step_loop import StepLoop

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
PORTS = {"dtype": "float32", "shape": [1]}
CONTRACT = {
    "schema": "1.0",
    "inputs": [{"name": "x", **PORTS}],
    "outputs": [{"name": "y", **PORTS}],
    "states": [{"name": "h", **PORTS}],
}


def model_of(nodes: list[object], functions: list[object] = [], weights: list[object] = []) -> ModelProto:  # noqa: B006
    def values(*names: str) -> list[object]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in names]

    nodes = [*nodes, helper.make_node("Identity", ["state_in.h"], ["state_out.h"])]
    graph = helper.make_graph(nodes, "g", values("x", "state_in.h"), values("y", "state_out.h"), weights)
    model = helper.make_model(graph, opset_imports=OPSETS, functions=functions, ir_version=9)
    helper.set_model_props(model, {"stepcell.contract": json.dumps(CONTRACT)})
    return model


def doubling(depth: int) -> ModelProto:
    """Functions that each call the next one twice: 2 ** depth nodes in a few hundred bytes."""
    functions = []
    for level in range(depth):
        name, domain = (f"F{level + 1}", "f") if level < depth - 1 else ("Neg", "")
        calls = [helper.make_node(name, [a], [b], domain=domain) for a, b in (("x", "m"), ("m", "y"))]
        functions.append(helper.make_function("f", f"F{level}", ["x"], ["y"], calls, OPSETS))
    return model_of([helper.make_node("F0", ["x"], ["y"], domain="f")], functions)


def endless_loop() -> ModelProto:
    carried = (("c", TensorProto.BOOL, []), ("v", TensorProto.FLOAT, [1]))
    ends = [helper.make_tensor_value_info("i", TensorProto.INT64, [])]
    ends += [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in carried]
    outs = [helper.make_tensor_value_info(f"{name}o", kind, shape) for name, kind, shape in carried]
    nodes = [helper.make_node("Identity", ["c"], ["co"]), helper.make_node("Neg", ["v"], ["vo"])]
    body = helper.make_graph(nodes, "body", ends, outs)
    weights = [helper.make_tensor("n", TensorProto.INT64, [], [1 << 62])]
    weights += [helper.make_tensor("t", TensorProto.BOOL, [], [1])]
    return model_of([helper.make_node("Loop", ["n", "t", "x"], ["y"], body=body)], [], weights)


def saved(model: ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_nodes_are_counted_without_visiting_them() -> None:
    assert inlined_nodes(doubling(3), "m") == (1 << 3) + 1
    started = time.monotonic()
    assert inlined_nodes(doubling(45), "m") == (1 << 45) + 1
    assert time.monotonic() - started < 1


def test_nested_functions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(doubling(40), tmp_path)
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match=r"1,099,511,627,777 nodes, at most 100,000") as refused:
        read_model(path)
    assert NODES.name in str(refused.value.hint)
    saved(doubling(4), tmp_path)
    read_model(path)
    monkeypatch.setenv(NODES.name, "10")
    with pytest.raises(InputError, match="at most 10"):
        read_model(path)
    monkeypatch.setenv(NODES.name, "many")
    with pytest.raises(UsageError, match="expected a number"):
        read_model(path)


def test_functions_that_call_themselves_are_refused(tmp_path: Path) -> None:
    model = doubling(3)
    model.functions[2].node[0].op_type, model.functions[2].node[0].domain = "F0", "f"
    with pytest.raises(InputError, match="calls itself"):
        read_model(saved(model, tmp_path))
    with pytest.raises(InputError, match="functions inside functions"):
        read_model(saved(doubling(60), tmp_path))


def test_the_first_step_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FIRST_STEP_SECONDS.name, "1")
    with StepLoop.open(saved(endless_loop(), tmp_path)) as loop:
        started = time.monotonic()
        with pytest.raises(StepcellError, match="the first step: not finished after 1 seconds") as refused:
            loop.step(x=np.ones(1, np.float32))
        assert time.monotonic() - started < 10
    assert FIRST_STEP_SECONDS.name in str(refused.value.hint)


def test_the_result_and_the_error_of_a_call_come_back() -> None:
    assert within_seconds(FIRST_STEP_SECONDS, lambda: 7, "x") == 7
    with pytest.raises(KeyError):
        within_seconds(FIRST_STEP_SECONDS, lambda: {}["a"], "x")
