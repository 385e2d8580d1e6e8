"""Ten ways to break a good file: each fails, and the verdict that fails first is the one that names the fault.

Five are changes of the graph or its weights, five of what runs it; a stack of a ConvGRU below a ConvLSTM is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from stepcell.exporter import export_onnx
from stepcell.exporter.module_step import module_jvp, module_step
from stepcell.models import CellStack, ConvGRUCell, ConvLSTMCell
from stepcell.runtime.evaluate import GraphEvaluator
from stepcell.runtime.verify.clips import random_clip, sizes_for
from stepcell.runtime.verify.references import as_written, in_float64
from stepcell.runtime.verify.results import failed
from stepcell.runtime.verify.stepper import Arrays, FunctionStepper, Running, StatelessRunning, Stepper
from stepcell.runtime.verify.verification import Findings, Reference, VerifyOptions, verify

Model = onnx.ModelProto
PLAN = VerifyOptions(steps=24, still=64, lyapunov=12, resumed=56)
SIZE = {"x": (1, 3, 8, 8)}


def network(seed: int = 0) -> CellStack:
    torch.manual_seed(seed)
    return CellStack([ConvGRUCell(3, 4), ConvLSTMCell(4, 4)]).eval()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "stack.onnx"
    export_onnx(network(), path, family="stack")
    return path


def look(subject: Stepper, own: Stepper | None, peer: Stepper | None = None) -> Findings:
    contract = subject.contract
    module = network()
    exact = FunctionStepper(
        module_step(module, contract), contract, "torch", jvp=module_jvp(module, contract), wide=True
    )
    rounded = FunctionStepper(module_step(module, contract, precision="float16"), contract, "rounded", wide=True)
    clip = random_clip(contract, sizes_for(contract, SIZE))
    return verify(subject, Reference(exact, peer, rounded), clip, PLAN, in_float64=own)


def names(found: Findings) -> list[str]:
    return [verdict.name for verdict in failed(found.verdicts)]


def test_the_good_file_passes(good: Path) -> None:
    found = look(as_written(good), in_float64(good))
    assert not names(found), [verdict.says for verdict in failed(found.verdicts)]


def initializer(model: Model, part: str) -> tuple[onnx.TensorProto, np.ndarray[Any, Any]]:
    tensor = next(each for each in model.graph.initializer if part in each.name)
    return tensor, numpy_helper.to_array(tensor).copy()


def states_swapped(model: Model) -> None:
    """h1 is fed back to c1 and c1 to h1."""
    other = {"state_in.h1": "state_in.c1", "state_in.c1": "state_in.h1"}
    for node in model.graph.node:
        node.input[:] = [other.get(name, name) for name in node.input]


def not_fed_back(model: Model) -> None:
    """c1 is read as zero."""
    model.graph.node.insert(0, helper.make_node("Sub", ["state_in.c1", "state_in.c1"], ["no_c1"]))
    for node in list(model.graph.node)[1:]:
        node.input[:] = ["no_c1" if name == "state_in.c1" else name for name in node.input]


def gate_order(model: Model) -> None:
    """The ConvGRU's update and reset gates are exchanged."""
    for part in ("cells.0.weight_x", "cells.0.weight_h", "cells.0.bias"):
        tensor, value = initializer(model, part)
        value[:8] = np.concatenate([value[4:8], value[:4]])
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def half_a_bias(model: Model) -> None:
    tensor, value = initializer(model, "cells.1.bias")
    tensor.CopyFrom(numpy_helper.from_array((value / 2).astype(value.dtype), tensor.name))


def cast_dropped(model: Model) -> None:
    """The new h of the ConvGRU passes through float16."""
    node = next(each for each in model.graph.node if "state_out.h0" in each.output)
    node.output[:] = ["wide_h0" if name == "state_out.h0" else name for name in node.output]
    model.graph.node.append(helper.make_node("Cast", ["wide_h0"], ["half_h0"], to=onnx.TensorProto.FLOAT16))
    model.graph.node.append(helper.make_node("Cast", ["half_h0"], ["state_out.h0"], to=onnx.TensorProto.FLOAT))


def shifted_by_a_pixel(model: Model) -> None:
    """The ConvGRU reads its state one column to the left."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 0, 1, 0, 0, 0, -1]), "pads"))
    model.graph.node.insert(0, helper.make_node("Pad", ["state_in.h0", "pads"], ["shifted"], mode="edge"))
    for node in list(model.graph.node)[1:]:
        node.input[:] = ["shifted" if name == "state_in.h0" else name for name in node.input]


GRAPHS: dict[str, tuple[Callable[[Model], None], str]] = {
    "states swapped": (states_swapped, "pairing"),
    "one state not fed back": (not_fed_back, "liveness"),
    "gate order": (gate_order, "identity"),
    "half a bias": (half_a_bias, "identity"),
    "a cast dropped": (cast_dropped, "precision"),
    "a state shifted by a pixel": (shifted_by_a_pixel, "identity"),
}


@pytest.mark.parametrize("mutation", GRAPHS)
def test_a_change_of_the_graph(good: Path, tmp_path: Path, mutation: str) -> None:
    change, verdict = GRAPHS[mutation]
    model = onnx.load(good)
    change(model)
    path = tmp_path / "broken.onnx"
    onnx.save(model, path)
    found = look(as_written(path), in_float64(path))
    assert verdict in names(found), [each.says for each in found.verdicts]
    if verdict != "precision":
        assert "identity" in names(found)


def test_weights_of_another_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    export_onnx(network(seed=1), path, family="stack")
    assert names(look(as_written(path), in_float64(path)))[0] == "identity"


class Broken:
    """A stepper with a fault in what feeds its states back, or in how its rows are kept apart."""

    def __init__(self, path: Path, fault: str) -> None:
        evaluator = GraphEvaluator(path)
        self._good = FunctionStepper(evaluator.step, evaluator.contract, "as written")
        self._fault = fault
        self.contract, self.name = evaluator.contract, "broken"

    def step(self, inputs: Mapping[str, Any], states: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
        outputs, new = self._good.step(inputs, states)
        if self._fault == "nan leak":
            spoiled = np.isnan(next(iter(inputs.values()))).any()
            new = {name: np.where(spoiled, np.nan, array).astype(array.dtype) for name, array in new.items()}
        return outputs, new

    def run(self) -> Running:
        return BrokenRun(self, self._fault)


class BrokenRun(StatelessRunning):
    def __init__(self, stepper: Stepper, fault: str) -> None:
        super().__init__(stepper)
        self._fault, self._steps, self._old = fault, 0, None

    def step(self, inputs: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
        self._steps += 1
        old = self._states
        outputs, new = super().step(inputs)
        if self._fault == "stale state" and self._steps % 50 == 0 and old is not None:
            self._states = {**new, "h0": old["h0"]}
        return outputs, dict(self._states or {})

    def reset(self, rows: Sequence[bool] | None = None) -> None:
        if self._fault != "reset ignored":
            super().reset(rows)


@pytest.mark.parametrize(
    ("fault", "verdict"), [("nan leak", "isolation"), ("stale state", "resume"), ("reset ignored", "reset")]
)
def test_a_fault_of_what_runs_it(good: Path, fault: str, verdict: str) -> None:
    options = VerifyOptions(steps=56, still=16, lyapunov=8, resumed=56)
    module, subject = network(), Broken(good, fault)
    exact = FunctionStepper(module_step(module, subject.contract), subject.contract, "torch", wide=True)
    clip = random_clip(subject.contract, sizes_for(subject.contract, SIZE))
    assert names(verify(subject, Reference(exact), clip, options)) == [verdict]


def test_hidden_float16_is_seen_though_the_contract_says_float32() -> None:
    """An engine that keeps a slow state in float16 inside: nothing of it is in the file."""
    from tests.runtime.verify.cells import contract, exact, slow_memory, stored

    spec = contract({"h": ("batch", 32)})
    narrow = stored(slow_memory(0.001), spec)

    def step(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
        outputs, new = narrow.step(inputs, states)
        return outputs, {name: array.astype(np.float16).astype(np.float32) for name, array in new.items()}

    clip = random_clip(spec, {"batch": 1})
    subject = FunctionStepper(step, spec, "hidden")
    found = verify(subject, Reference(exact(slow_memory(0.001), spec)), clip, VerifyOptions(steps=16))
    assert "storage" in names(found)
