"""A quick run of every harness; `make fuzz` runs them for hours."""

from __future__ import annotations

import importlib.util

import pytest

from tests.fuzz.harness import fuzz
from tests.fuzz.inputs import INPUTS, Input

NEEDS = {"onnx": "onnxruntime", "build": "onnx", "fuse": "onnxscript", "video": "av"}


@pytest.mark.parametrize("what", INPUTS, ids=lambda each: each.name)
def test_changed_files_end_in_errors_of_stepcell(what: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = NEEDS.get(what.name)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    monkeypatch.setenv("STEPCELL_FIRST_STEP_SECONDS", "10")
    found = fuzz(what, seed=0, cases=200 // what.cost, seconds=3)
    assert not found.faults, "\n".join(found.faults.values())
    assert found.cases
