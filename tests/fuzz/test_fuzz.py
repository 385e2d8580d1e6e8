"""A quick run of every harness; `make fuzz` runs them for hours."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.fuzz.__main__ import NAMES
from tests.fuzz.harness import fuzz
from tests.fuzz.inputs import INPUTS, Input

NEEDS = {
    "onnx": "onnxruntime",
    "build": "onnx",
    "fuse": "onnxscript",
    "video": "av",
    **dict.fromkeys(("checkpoint", "old-checkpoint", "safetensors"), "torch"),
}


@pytest.fixture(params=INPUTS, ids=lambda each: each.name)
def what(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Input:
    what: Input = request.param
    needed = NEEDS.get(what.name)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    monkeypatch.setenv("STEPCELL_FIRST_STEP_SECONDS", "10")
    return what


def test_the_seeds_are_accepted(what: Input, tmp_path: Path) -> None:
    """What refuses the seeds says nothing about files that are changed a little."""
    for data in what.seeds():
        path = tmp_path / f"seed{what.suffix}"
        path.write_bytes(data)
        what.use(path)


def test_changed_files_end_in_errors_of_stepcell(what: Input) -> None:
    found = fuzz(what, seed=0, cases=200 // what.cost, seconds=3)
    assert not found.faults, "\n".join(found.faults.values())
    assert found.cases


def test_the_command_knows_every_input() -> None:
    assert tuple(each.name for each in INPUTS) == NAMES
