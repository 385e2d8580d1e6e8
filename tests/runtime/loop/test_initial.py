"""Learned initial states: used at the start, in resets and in slots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.contract import StepContract
from stepcell.models import CellStack, run_sequence


def frames(count: int, batch: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(0).random((count, batch, 3, 10, 14), np.float32)


def start(contract: StepContract, rows: int = 1) -> dict[str, NDArray[np.float32]]:
    """h0 rises over its channels, c1 is 0.7 everywhere, h1 zero."""
    h0 = torch.linspace(-0.5, 0.5, 6).reshape(1, 6, 1, 1).numpy()
    values = {"h0": h0, "h1": np.float32([[[[0]]]]), "c1": np.float32([[[[0.7]]]])}
    shapes = contract.state_shapes({"batch": rows, "height": 10, "width": 14})
    return {name: np.broadcast_to(values[name], shape) for name, shape in shapes.items()}


def test_many_steps_equal_torch(learned: CellStack, learned_onnx: Path) -> None:
    xs = frames(50, 2)
    with torch.no_grad():
        expected, _ = run_sequence(learned, torch.from_numpy(xs))
    with StepLoop.open(learned_onnx) as loop:
        for x, y in zip(xs, expected.numpy(), strict=True):
            np.testing.assert_allclose(loop.step(x=x)["y"], y, atol=2e-6)
        loop.reset()
        np.testing.assert_allclose(loop.step(x=xs[0])["y"], expected[0].numpy(), atol=2e-6)


def test_reset_of_one_row_is_its_initial_value(learned_onnx: Path) -> None:
    xs = frames(5, 2)
    with StepLoop.open(learned_onnx) as loop:
        for x in xs:
            loop.step(x=x)
        before = loop.state()
        before["c1"][0] = np.nan
        loop.load_state(before)
        loop.reset([True, False])
        initial = start(loop.contract, 2)
        for name, state in loop.state().items():
            np.testing.assert_array_equal(state[0], initial[name][0])
            np.testing.assert_array_equal(state[1], before[name][1])


def test_a_slot_starts_there_whenever_it_is_attached(learned_onnx: Path, tmp_path: Path) -> None:
    xs, path = frames(5), tmp_path / "state.safetensors"
    with StepLoop.open(learned_onnx) as alone:
        expected = [alone.step(x=x)["y"] for x in xs]
    with StepLoop.open(learned_onnx, slots=2) as loop:
        early = loop.attach()
        np.testing.assert_array_equal(loop.step_slots({early: {"x": xs[0]}})[early]["y"], expected[0])
        loop.save(path)
        late = loop.attach()
        for number, x in enumerate(xs):
            outputs = loop.step_slots({late: {"x": x}} | ({early: {"x": xs[number + 1]}} if number < 4 else {}))
            np.testing.assert_array_equal(outputs[late]["y"], expected[number])
            assert number == 4 or np.array_equal(outputs[early]["y"], expected[number + 1])
    with StepLoop.open(learned_onnx, slots=2) as other:
        other.restore(path)
        new = other.attach("new")
        np.testing.assert_array_equal(other.step_slots({new: {"x": xs[0]}})[new]["y"], expected[0])


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_float32_form_starts_there_too(learned: CellStack, tmp_path: Path, precision: str) -> None:
    from stepcell.exporter import export_onnx

    path = tmp_path / "model.onnx"
    export_onnx(learned, path, precision=precision, state_dtype="float16")  # type: ignore[arg-type]
    with StepLoop.open(path) as loop:
        loop.step(x=frames(1)[0])
        loop.reset([True])
        for name, expected in start(loop.contract).items():
            np.testing.assert_allclose(loop.state()[name], expected, atol=5e-4)  # as float16 has them
