"""What rounding may cost a file: mistakes and stalls are told from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepcell import StateSpec, TensorSpec
from stepcell.contract import Parity
from stepcell.errors import ParityError
from stepcell.exporter import export_onnx
from stepcell.exporter.arithmetic import AS_WRITTEN, IN_ONNX_RUNTIME, EvaluatedFile
from stepcell.exporter.module_step import module_step
from stepcell.exporter.parity import Arrays, CheckClip, Step, random_clip
from stepcell.exporter.rounding import CheckedFile, check_rounding
from stepcell.runtime.evaluate.registry import OPERATORS

SIZES = {"x": (2, 3), "h": (2, 3)}


class Mean(nn.Module):
    """An exponential mean, with gates that are one value each."""

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        self.inputs = [TensorSpec(name="x", shape=("batch", 3))]
        self.outputs = [TensorSpec(name="y", shape=("batch", 3))]
        self.states = [StateSpec(name="h", shape=("batch", 3))]
        self.decay = nn.Parameter(torch.tensor([decay]))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new = h * self.decay + x * (1 - self.decay)
        return 2 * new, new


Change = Callable[[Step], Step]


def check(tmp_path: Path, change: Change, arithmetic: str = IN_ONNX_RUNTIME, steps: int = 40) -> Parity:
    """The check of a file whose step is computed otherwise than it says."""
    model, path = Mean(), tmp_path / "mean.onnx"
    contract = export_onnx(model, path, precision="float32")
    data = path.read_bytes()
    exact = module_step(model, contract)

    def reference(frame: Arrays, states: Arrays) -> Arrays:
        outputs, new = exact(frame, states)
        return {**outputs, **new}

    step = change(EvaluatedFile(data, "as_written", contract).step)
    file = CheckedFile(data, step, arithmetic, contract, lambda: reference)
    clip: CheckClip = random_clip(contract, "sizes {}", SIZES, steps)
    return check_rounding(reference, file, [clip], subject="the module")


def off_by(offset: float) -> Change:
    def change(step: Step) -> Step:
        def other(frame: Arrays, states: Arrays) -> Arrays:
            return {name: array + np.float32(offset) for name, array in step(frame, states).items()}

        return other

    return change


def test_a_contracting_model_has_a_bound(tmp_path: Path) -> None:
    parity = check(tmp_path, lambda step: step)
    assert parity.rho == pytest.approx(0.9, rel=1e-6)
    assert parity.memory == pytest.approx(10, rel=1e-5)
    assert parity.bound is not None
    assert all(0 < parity.rms_error[name] <= parity.bound[name] < 1e-5 for name in ("y", "h"))


def test_a_mistake_is_not_taken_for_rounding(tmp_path: Path) -> None:
    says = r"differs from the module by 0.01, the limit is 0.0001, at step 0 of 40 \(random frames, sizes {}\)"
    with pytest.raises(ParityError, match=says):
        check(tmp_path, off_by(0.01))


def test_a_small_mistake_that_adds_up_is_found(tmp_path: Path) -> None:
    """Below the tolerance at every single step, beyond it after ten."""
    with pytest.raises(ParityError, match="differs from the module"):
        check(tmp_path, off_by(3e-5))


def test_a_run_that_its_single_steps_do_not_explain_is_refused(tmp_path: Path) -> None:
    """Every step from the reference's states is right, and every step from its own is off: it is biased."""

    def biased(step: Step) -> Step:
        returned: list[np.ndarray] = []

        def other(frame: Arrays, states: Arrays) -> Arrays:
            results = step(frame, states)
            own = any(np.array_equal(states["h"], array) for array in returned)
            returned.append(results["h"] + np.float32(0.01 if own else 0))
            return {**results, "h": returned[-1]}

        return other

    with pytest.raises(ParityError, match=r"is off from the module .* h stalls or is biased"):
        check(tmp_path, biased, AS_WRITTEN)


def test_infinity_is_refused(tmp_path: Path) -> None:
    def overflowing(step: Step) -> Step:
        return lambda frame, states: {name: array * np.float32(np.inf) for name, array in step(frame, states).items()}

    with pytest.raises(ParityError, match="holds Inf or NaN at step 0 of 40"):
        check(tmp_path, overflowing, AS_WRITTEN)


def test_without_the_evaluator_nothing_beyond_the_tolerance_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(OPERATORS, "Mul")
    parity = export_onnx(Mean(), tmp_path / "m.onnx", precision="float32").parity
    assert parity is not None
    assert parity.rho is parity.memory is parity.bound is None
    assert "operator Mul is not implemented; no error bound is derived" in caplog.text
