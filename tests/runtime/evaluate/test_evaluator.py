"""GraphEvaluator: what a step in float16 computes, by the standard and not by a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from stepcell import StepLoop
from stepcell.contract import InitialValue, StateSpec, TensorSpec
from stepcell.errors import ContractError, EvaluationError, InputError, StateError, UsageError
from stepcell.runtime.evaluate import GraphEvaluator
from tests.runtime.evaluate.step_models import slow_memory, step_model

X = np.zeros((1, 4), np.float16)


def run(evaluator: GraphEvaluator, steps: int) -> float:
    states = evaluator.initial_states({"x": X.shape})
    for _ in range(steps):
        _, states = evaluator.step({"x": X}, states)
    return float(states["h"].max())


def test_a_slow_memory_stalls_in_float16_and_not_in_float32() -> None:
    assert run(GraphEvaluator(slow_memory()), 3000) == 0.755859375
    assert run(GraphEvaluator(slow_memory(stored="float16")), 3000) == 0.755859375
    assert run(GraphEvaluator(slow_memory("float32", stored="float16")), 3000) == 0.755859375
    assert run(GraphEvaluator(slow_memory("float32")), 12000) == pytest.approx(1, abs=1e-4)
    assert run(GraphEvaluator(slow_memory(), "float32"), 12000) == pytest.approx(1, abs=1e-4)
    assert run(GraphEvaluator(slow_memory(), "float64"), 12000) == pytest.approx(1, abs=1e-4)


def test_onnx_runtime_on_a_cpu_does_not_round_where_the_file_says_so() -> None:
    """The reason for this evaluator: casts to float16 and back are dropped at every optimisation level."""
    ort = pytest.importorskip("onnxruntime")
    if tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24):
        pytest.skip("ONNX Runtime 1.23 drops a cast and then refuses the graph, whose types no longer fit")
    model = slow_memory()
    reference = ReferenceEvaluator(model)
    found = {}
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found[level] = _free_run(session.run)
    found["reference"] = _free_run(reference.run)
    print(found)
    assert found.pop("reference") == run(GraphEvaluator(model), 10000) == 0.755859375
    assert all(value > 0.9999 for value in found.values())


def _free_run(step: Any) -> float:
    h = np.zeros((1, 4), np.float32)
    for _ in range(10000):
        (h,) = step(["state_out.h"], {"x": X, "state_in.h": h})
    return float(h.max())


def test_float32_equals_the_form_that_the_loop_runs(denoiser_onnx: Path) -> None:
    evaluator, rng = GraphEvaluator(denoiser_onnx, "float32"), np.random.default_rng(0)
    states = evaluator.initial_states({"x": (2, 3, 12, 16)})
    with StepLoop.open(denoiser_onnx) as loop:
        for _ in range(5):
            x = rng.random((2, 3, 12, 16)).astype(np.float32)
            outputs, states = evaluator.step({"x": x}, states)
            assert np.allclose(outputs["y"], loop.step(x=x)["y"], rtol=0, atol=1e-5)
        assert np.allclose(states["h"], loop.state()["h"], rtol=0, atol=1e-5)


def test_a_whole_model_in_float16_is_that_of_onnx_reference(denoiser_onnx: Path) -> None:
    """But for a second rounding, which onnx.reference does before it adds the bias of a convolution."""
    evaluator, rng = GraphEvaluator(denoiser_onnx), np.random.default_rng(0)
    reference = ReferenceEvaluator(onnx.load(denoiser_onnx))
    x, h = rng.random((1, 3, 12, 16)).astype(np.float16), rng.uniform(-1, 1, (1, 8, 6, 8)).astype(np.float32)
    outputs, states = evaluator.step({"x": x}, {"h": h})
    y, new = reference.run(["y", "state_out.h"], {"x": x, "state_in.h": h})
    assert (outputs["y"].dtype, states["h"].dtype) == (y.dtype, new.dtype) == (np.float16, np.float32)
    assert np.abs(outputs["y"].astype(float) - y).max() < 2e-3
    assert np.abs(states["h"] - new).max() < 1e-3


def test_a_learned_initial_state_is_where_it_starts() -> None:
    model = step_model(
        """
        g (float[batch, 2] x, float[batch, 2] "state_in.h") => (float[batch, 2] y, float[batch, 2] "state_out.h") {
          y = Add(x, "state_in.h")
          "state_out.h" = Identity(y)
        }""",
        [TensorSpec(name="x", shape=("batch", 2))],
        [TensorSpec(name="y", shape=("batch", 2))],
        [StateSpec(name="h", shape=("batch", 2), init=InitialValue.of(np.array([0.5, -1], np.float32)))],
    )
    states = GraphEvaluator(model, "float64").initial_states({"x": (3, 2)})
    assert states["h"].dtype == np.float64
    assert states["h"].tolist() == [[0.5, -1]] * 3


def test_names_shapes_and_kinds_are_checked(tmp_path: Path) -> None:
    evaluator = GraphEvaluator(slow_memory())
    states = evaluator.initial_states({"x": X.shape})
    with pytest.raises(InputError, match="expected x, got z"):
        evaluator.step({"z": X}, states)
    with pytest.raises(StateError, match="expected h, got none"):
        evaluator.step({"x": X}, {})
    with pytest.raises(StateError, match=r"h: expected shape \(1, 4\), got \(2, 4\)"):
        evaluator.step({"x": X}, {"h": np.zeros((2, 4))})
    with pytest.raises(InputError, match="x: expected float16, got int64"):
        evaluator.step({"x": np.zeros((1, 4), int)}, states)
    with pytest.raises(UsageError, match="arithmetic: expected as_written, float64, float32, got 'half'"):
        GraphEvaluator(slow_memory(), "half")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="jvp: expected a model evaluated in 'float64'"):
        evaluator.jvp({"x": X}, states, states)
    model = slow_memory()
    del model.metadata_props[:]
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(ContractError, match=r"model.onnx: has no state contract"):
        GraphEvaluator(path)


def test_results_are_the_callers() -> None:
    """A state that is passed through, a constant that is an output: changing one changes nothing else."""
    model = step_model(
        """
        g (float[1, 4] x, float[1, 4] "state_in.h") => (float[1, 4] y, float[1, 4] "state_out.h") {
          y = Constant<value = float[1, 4] {1.0, 2.0, 3.0, 4.0}>()
          "state_out.h" = Identity("state_in.h")
        }""",
        [TensorSpec(name="x", shape=(1, 4))],
        [TensorSpec(name="y", shape=(1, 4))],
        [StateSpec(name="h", shape=(1, 4))],
    )
    evaluator, h = GraphEvaluator(model), np.ones((1, 4), np.float32)
    for _ in range(2):
        outputs, states = evaluator.step({"x": X.astype(np.float32)}, {"h": h})
        assert outputs["y"].tolist() == [[1, 2, 3, 4]]
        outputs["y"][:] = states["h"][:] = 7
    assert h.max() == 1


def test_an_operator_that_is_not_implemented_is_named() -> None:
    model = slow_memory()
    model.graph.node[5].op_type = "Det"
    with pytest.raises(EvaluationError, match="node 'rest': operator Det is not implemented"):
        GraphEvaluator(model)
