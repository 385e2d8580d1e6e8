"""Unchanged models of three families pass against their checkpoints; benchmarks/verify_families.py has more."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepcell.exporter import export_onnx, load_checkpoint, step_model
from stepcell.exporter.module_step import module_jvp, module_step
from stepcell.runtime.verify.clips import random_clip, sizes_for
from stepcell.runtime.verify.references import as_written, in_float64
from stepcell.runtime.verify.results import failed
from stepcell.runtime.verify.stepper import FunctionStepper
from stepcell.runtime.verify.verification import Reference, VerifyOptions, verify
from tests.golden.cases import KEPT, Case

PLAN = VerifyOptions(steps=32, still=64, window=32, lyapunov=16, resumed=16)
SIZE = 12


@pytest.mark.parametrize("family", ["jacobkimmel_convgru", "ndrplz_convlstm", "raft_convgru"])
def test_a_family_passes_and_its_error_is_predicted(family: str, tmp_path: Path) -> None:
    case = Case(next(iter(sorted((KEPT / family).glob("*/case.json")))).parent)
    model, _, _ = step_model(load_checkpoint(case.path / "checkpoint.pth"), family, case.settings)
    path = tmp_path / "model.onnx"
    export_onnx(model, path, family=family)
    subject = as_written(path)
    contract = subject.contract
    exact = FunctionStepper(module_step(model, contract), contract, "torch", jvp=module_jvp(model, contract), wide=True)
    rounded = FunctionStepper(module_step(model, contract, precision="float16"), contract, "rounded", wide=True)
    sizes = {symbol: min(size, SIZE) for symbol, size in sizes_for(contract).items()}
    found = verify(
        subject, Reference(exact, None, rounded), random_clip(contract, sizes), PLAN, in_float64=in_float64(path)
    )
    assert not failed(found.verdicts), [verdict.says for verdict in failed(found.verdicts)]
    # along the clip; with the frame held, rounding repeats itself from step to step and adds up otherwise
    for each in found.moving:
        assert each.predicted[-1] == pytest.approx(each.measured[-1], rel=0.1)
