"""Models stepped in ncnn: states, slots, failures, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from stepcell import StepLoop
from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import InputError, MissingDependencyError, StepcellError, UsageError
from stepcell.runtime.backends.ncnn import net
from stepcell.runtime.evaluate.evaluator import GraphEvaluator

pytestmark = pytest.mark.skipif(find_spec("ncnn") is None, reason="the package ncnn is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stepcell" / "backends"


def in_ncnn(path: Path, **options: Any) -> StepLoop:
    return StepLoop.open(path, backend="ncnn", threads=1, **options)


def frames(count: int, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).random((count, *shape), np.float32)


def test_many_steps_against_float64(denoiser_onnx_float32: Path) -> None:
    """The error does not grow, and is at most twice that of ONNX Runtime."""
    exact = GraphEvaluator(denoiser_onnx_float32, "float64")
    errors: dict[str, list[float]] = {"ncnn": [], "onnxruntime": []}
    xs = frames(4, 1, 3, 32, 48)
    loops = {name: StepLoop.open(denoiser_onnx_float32, backend=name, threads=1) for name in errors}
    states = exact.initial_states({"x": xs[0].shape})
    for number in range(200):
        x = xs[number % 4]
        outputs, states = exact.step({"x": x}, states)
        for name, loop in loops.items():
            errors[name].append(float(np.sqrt(np.mean((loop.step(x=x)["y"] - outputs["y"]) ** 2))))
    worst = {name: max(found) for name, found in errors.items()}
    print(f"worst rms error of 200 steps: {worst}")
    assert worst["ncnn"] <= 2 * worst["onnxruntime"]
    assert max(errors["ncnn"][100:]) <= 1.5 * max(errors["ncnn"][:100])


def test_two_kinds_of_cells_and_learned_initial_states(learned_onnx: Path) -> None:
    xs = frames(6, 2, 3, 20, 28)
    with in_ncnn(learned_onnx) as loop, StepLoop.open(learned_onnx) as other:
        assert loop.description.startswith("ncnn 1.")
        for x in xs:
            found, expected = loop.step(x=x), other.step(x=x)
            for name, array in expected.items():
                np.testing.assert_allclose(found[name], array, atol=2e-6)
        for name, array in other.state().items():
            np.testing.assert_allclose(loop.state()[name], array, atol=2e-6)
        loop.reset([False, True])
        other.reset([False, True])
        for name, array in other.state().items():
            np.testing.assert_array_equal(loop.state()[name][1], array[1])


def test_a_state_is_exact_where_the_arithmetic_is(accumulator: Callable[..., Path]) -> None:
    """h + x with bytes: sizes that are no multiple of anything, resets, states read and written."""
    path = accumulator(shape=("batch", 3, "height", "width"))
    x = np.arange(2 * 3 * 5 * 7, dtype=np.float32).reshape(2, 3, 5, 7)
    with in_ncnn(path) as loop:
        for count in range(1, 5):
            np.testing.assert_array_equal(loop.step(x=x)["y"], count * x)
        loop.reset([True, False])
        y = loop.step(x=x)["y"]
        np.testing.assert_array_equal(y[0], x[0])
        np.testing.assert_array_equal(y[1], 5 * x[1])
        loop.load_state({"h": 2 * x})
        y[...] = 0  # outputs belong to the caller: the state is not the same memory
        np.testing.assert_array_equal(loop.state()["h"], 2 * x)
        np.testing.assert_array_equal(loop.step(x=x)["y"], 3 * x)
        loop.reset()
        np.testing.assert_array_equal(loop.step(x=x[:1, :, :3, :2])["y"], x[:1, :, :3, :2])


def test_a_state_may_be_loaded_before_the_first_step(accumulator: Callable[..., Path]) -> None:
    x = frames(1, 2, 3, 4, 4)[0]
    with in_ncnn(accumulator()) as loop:
        loop.load_state({"h": x})
        np.testing.assert_array_equal(loop.step(x=x)["y"], x + x)


def test_an_array_of_the_caller_is_not_written(accumulator: Callable[..., Path]) -> None:
    x = frames(1, 1, 3, 4, 4)[0]
    kept = x.copy()
    with in_ncnn(accumulator()) as loop:
        for _ in range(3):
            loop.step(x=x)
    np.testing.assert_array_equal(x, kept)


def test_rows_without_a_frame_are_not_computed(accumulator: Callable[..., Path], monkeypatch: Any) -> None:
    rows: list[int] = []
    step = net.Net.step
    with in_ncnn(accumulator(), slots=4) as loop:
        first, second = loop.attach("first"), loop.attach("second")
        x = frames(1, 1, 3, 4, 4)[0]
        loop.step_slots({first: {"x": x}, second: {"x": x}})
        monkeypatch.setattr(net.Net, "step", lambda *given: (rows.append(1), step(*given))[1])
        y = loop.step_slots({second: {"x": x}})[second]["y"]
        assert len(rows) == 1  # neither the idle slot nor the two that hold no stream
        np.testing.assert_array_equal(y, x + x)
        np.testing.assert_array_equal(loop.step_slots({first: {"x": x}})[first]["y"], x + x)
        late = loop.attach("late")
        np.testing.assert_array_equal(loop.step_slots({late: {"x": x}})[late]["y"], x)


def test_a_step_that_fails_changes_no_row(accumulator: Callable[..., Path], monkeypatch: Any) -> None:
    x = frames(1, 2, 3, 4, 4)[0]
    with in_ncnn(accumulator()) as loop:
        loop.step(x=x)
        before, step, calls = loop.state()["h"], net.Net.step, [0]

        def second_fails(*given: Any) -> Any:
            calls[0] += 1
            if calls[0] == 2:
                raise MemoryError
            return step(*given)

        monkeypatch.setattr(net.Net, "step", second_fails)
        with pytest.raises(StepcellError, match="not enough memory"):
            loop.step(x=x)
        np.testing.assert_array_equal(loop.state()["h"], before)
        monkeypatch.undo()
        np.testing.assert_array_equal(loop.step(x=x)["y"], 2 * x)


def test_a_step_can_be_asked_to_end(accumulator: Callable[..., Path], monkeypatch: Any) -> None:
    x = frames(1, 2, 3, 4, 4)[0]
    with in_ncnn(accumulator()) as loop:
        loop.step(x=x)
        step = net.Net.step
        monkeypatch.setattr(net.Net, "step", lambda *given: (loop.interrupt(), step(*given))[1])
        with pytest.raises(StepcellError, match="asked to end"):
            loop.step(x=x)
        monkeypatch.undo()
        np.testing.assert_array_equal(loop.step(x=x)["y"], 2 * x)


def test_nan_is_refused_or_passes_through(denoiser_onnx: Path) -> None:
    x = frames(1, 1, 3, 32, 32)[0]
    x[0, 0, 4, 4] = np.nan
    with in_ncnn(denoiser_onnx) as loop:
        with pytest.raises(InputError, match="NaN"):
            loop.step(x=x)
        loop.check_finite = False
        assert np.isnan(loop.step(x=x)["y"]).any()
        loop.reset()
        assert np.isfinite(loop.step(x=np.zeros_like(x))["y"]).all()


def test_a_model_of_rows_of_numbers(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    """A dense GRU: tensors of two axes, matrix products."""
    rng = np.random.default_rng(0)
    contract = StepContract(
        inputs=(TensorSpec(name="x", shape=("batch", 5)),),
        outputs=(TensorSpec(name="y", shape=("batch", 8)),),
        states=(StateSpec(name="h", shape=("batch", 8)),),
    )
    weights = {"w": (5, 24), "u": (8, 24), "b": (24,)}
    tensors = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name) for name, shape in weights.items()
    ]
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["xw"]),
        node("Add", ["xw", "b"], ["a"]),
        node("MatMul", ["state_in.h", "u"], ["g"]),
        node("Split", ["a"], ["a_z", "a_r", "a_n"], axis=1, num_outputs=3),
        node("Split", ["g"], ["g_z", "g_r", "g_n"], axis=1, num_outputs=3),
        node("Add", ["a_z", "g_z"], ["s_z"]),
        node("Sigmoid", ["s_z"], ["z"]),
        node("Add", ["a_r", "g_r"], ["s_r"]),
        node("Sigmoid", ["s_r"], ["r"]),
        node("Mul", ["r", "g_n"], ["rg"]),
        node("Add", ["a_n", "rg"], ["s_n"]),
        node("Tanh", ["s_n"], ["n"]),
        node("Sub", ["state_in.h", "n"], ["d"]),
        node("Mul", ["z", "d"], ["zd"]),
        node("Add", ["n", "zd"], ["y"]),
        node("Identity", ["y"], ["state_out.h"]),
    ]
    path = write_model(tmp_path / "gru.onnx", contract, nodes, initializer=tensors)
    with in_ncnn(path) as loop, StepLoop.open(path) as other:
        for x in frames(20, 3, 5):
            np.testing.assert_allclose(loop.step(x=x)["y"], other.step(x=x)["y"], atol=2e-6)


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((2, 3, "height", "width"), {}, "first axis"),
        (("batch", 3, "height", "width"), {"dtype": "int32"}, "of type int32"),
    ],
)
def test_what_ncnn_cannot_run_is_told(
    accumulator: Callable[..., Path], shape: tuple[int | str, ...], options: dict[str, Any], reason: str
) -> None:
    path = accumulator(shape=shape, **options)
    with in_ncnn(path) as loop, pytest.raises(UsageError, match=reason) as raised:
        loop.step(x=np.zeros((2, 3, 4, 4), options.get("dtype", np.float32)))
    assert "onnxruntime" in str(raised.value.hint)


def test_arguments_that_do_not_fit(denoiser_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ncnn runs ONNX files on the CPU"):
        StepLoop.open(tmp_path / "model.engine", "cuda", backend="ncnn")
    with pytest.raises(UsageError, match="computes in float32"):
        StepLoop.open(denoiser_onnx, backend="ncnn", keep_float16=True)
    with pytest.raises(UsageError, match="expected auto, onnxruntime, ncnn"):
        StepLoop.open(denoiser_onnx, backend="torch")


def test_without_the_package(denoiser_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise MissingDependencyError("running a model in ncnn needs the package 'ncnn', which is not installed")

    monkeypatch.setattr("stepcell.runtime.backends.ncnn.net.require", absent)
    with pytest.raises(MissingDependencyError, match="not installed"):
        in_ncnn(denoiser_onnx)
    monkeypatch.setenv("STEPCELL_BACKEND", "auto")
    with StepLoop.open(denoiser_onnx) as loop:
        assert loop.description.startswith("ONNX Runtime")
