"""A contract is checked as a whole when it is read: what passes cannot fail in a library later."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stepcell.contract import StepContract
from stepcell.errors import ContractError

EVENTS = {"representation": "voxel_grid", "bins": 3, "window": {"size": 30000, "unit": "us"}}


def document() -> dict[str, Any]:
    shape = ["batch", 3, "height", "width"]
    return {
        "schema": "1.0",
        "inputs": [{"name": "x", "shape": shape, "layout": "NCHW", "range": [0, 1], "pad_multiple": 2}],
        "outputs": [{"name": "y", "shape": shape, "layout": "NCHW"}],
        "states": [{"name": "h", "shape": ["batch", 8, "height // 2", "width // 2"]}],
        "example": {"batch": 1, "height": 64, "width": 64},
    }


def test_the_document_itself_is_accepted() -> None:
    assert StepContract.from_json(json.dumps(document())).to_json()


@pytest.mark.parametrize(
    ("section", "changes", "names"),
    [
        ("inputs", {"layout": "NCH"}, "layout"),
        ("inputs", {"layout": "NCHH"}, "layout"),
        ("inputs", {"layout": "nchw"}, "layout"),
        ("inputs", {"layout": ""}, "layout"),
        ("inputs", {"pad_multiple": 0}, "pad_multiple"),
        ("inputs", {"pad_multiple": -4}, "pad_multiple"),
        ("inputs", {"pad_multiple": 1 << 40}, "pad_multiple"),
        ("inputs", {"layout": None}, "pad_multiple"),
        ("inputs", {"range": [0, 0]}, "range"),
        ("inputs", {"range": [1, 0]}, "range"),
        ("outputs", {"range": [0.5, 0.5]}, "range"),
        ("inputs", {"mean": []}, "mean"),
        ("inputs", {"mean": [0.5, 0.5]}, "mean"),
        ("inputs", {"std": [1, 1, 1, 1]}, "std"),
        ("inputs", {"std": [1, 0, 1]}, "std"),
        ("inputs", {"std": [1, -1, 1]}, "std"),
        ("inputs", {"shape": ["batch", 0, "height", "width"]}, "dimension"),
        ("inputs", {"shape": ["batch", -3, "height", "width"]}, "dimension"),
        ("inputs", {"shape": ["batch", 1 << 70, "height", "width"]}, "dimension"),
        ("inputs", {"shape": ["batch", "a.b", "height", "width"]}, "dimension"),
        ("inputs", {"shape": [1] * 9, "layout": None, "pad_multiple": 1}, "axes"),
        ("inputs", {"name": ""}, "name"),
        ("inputs", {"name": "x\x1b[2J"}, "name"),
        ("inputs", {"name": "x\nerror: y"}, "name"),
        ("inputs", {"name": "h"}, "unique"),
        ("inputs", {"name": "state_in.h"}, "unique"),
        ("outputs", {"name": "state_out.h"}, "unique"),
        ("states", {"batch_axis": 4}, "batch_axis"),
        ("states", {"batch_axis": -1}, "batch_axis"),
        ("states", {"shape": []}, "batch_axis"),
        ("states", {"shape": ["batch", "depth"]}, "depth"),
        ("inputs", {"events": {**EVENTS, "window": {"size": 0.4, "unit": "us"}}}, "window"),
        ("inputs", {"events": {**EVENTS, "window": {"size": 1.5, "unit": "events"}}}, "window"),
        ("inputs", {"events": {**EVENTS, "window": {"size": 0, "unit": "events/pixel"}}}, "window"),
        ("inputs", {"events": {**EVENTS, "window": {"size": 1e300, "unit": "us"}}}, "window"),
    ],
)
def test_each_field_is_checked(section: str, changes: dict[str, Any], names: str) -> None:
    contract = document()
    contract[section][0].update(changes)
    with pytest.raises(ContractError, match=names):
        StepContract.from_json(json.dumps(contract))


@pytest.mark.parametrize("text", [b"\xff\xfe", b'{"schema": "\xff"}', b"[" * 100_000, b"{", b"null", b'{"schema": 1}'])
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(ContractError, match="malformed"):
        StepContract.from_json(text)


def test_deep_nesting_is_refused() -> None:
    deep = (
        '{"schema": "1.0", "inputs": [], "outputs": [], "states": [], "source": '
        + '{"a":' * 50_000
        + "1"
        + "}" * 50_001
    )
    with pytest.raises(ContractError, match="nested too deeply"):
        StepContract.from_json(deep)


def test_a_state_is_not_empty() -> None:
    contract = document()
    contract["states"][0]["shape"] = ["batch", 8, "height // 64", "width - 60"]
    parsed = StepContract.from_json(json.dumps(contract))
    with pytest.raises(Exception, match="larger frames"):
        parsed.state_shapes({"batch": 1, "height": 32, "width": 32})
