"""The contract document: round trip, versions, damage."""

from __future__ import annotations

import json

import msgspec
import pytest

from stepcell.contract import CellSpec, Parity, StateSpec, StepContract, TensorSpec, state_names
from stepcell.errors import ContractError, InputError

IMAGE = ("batch", 3, "height", "width")


@pytest.fixture
def contract() -> StepContract:
    return StepContract(
        inputs=(TensorSpec(name="x", shape=IMAGE, dtype="float16", layout="NCHW", range=(0.0, 1.0), pad_multiple=4),),
        outputs=(TensorSpec(name="y", shape=IMAGE, dtype="float16", layout="NCHW"),),
        states=(StateSpec(name="h", shape=("batch", 32, "height // 4", "width // 4")),),
        family="convgru",
        precision="float16",
        cells=(CellSpec(name="cell", op="stepcell::ConvGRU", hidden=32, kernel=(3, 3), reset="before"),),
        example={"batch": 1, "height": 256, "width": 256},
        source={"opset": 20},
        parity=Parity(steps=32, reference="torch float64", max_abs_error={"y": 0.1}),
    )


def test_round_trip(contract: StepContract) -> None:
    assert StepContract.from_json(contract.to_json()) == contract


def test_document_spells_out_what_a_reader_needs(contract: StepContract) -> None:
    document = json.loads(contract.to_json())
    assert document["schema"] == "1.1"
    state = document["states"][0]
    assert (state["input"], state["output"], state["init"]) == ("state_in.h", "state_out.h", "zeros")
    assert document["cells"] == [
        {"name": "cell", "op": "stepcell::ConvGRU", "hidden": 32, "kernel": [3, 3], "reset": "before"}
    ]


def test_sizes_follow_from_the_input(contract: StepContract) -> None:
    symbols = contract.bind({"x": (2, 3, 64, 96)})
    assert contract.state_shapes(symbols) == {"h": (2, 32, 16, 24)}
    with pytest.raises(InputError, match="multiples of 4, got"):
        contract.bind({"x": (2, 3, 66, 96)})
    with pytest.raises(InputError, match="inputs: expected x, got frame"):
        contract.bind({"frame": (2, 3, 64, 96)})


def test_newer_minor_versions_and_unknown_fields_are_read(contract: StepContract) -> None:
    document = json.loads(contract.to_json()) | {"schema": "1.7", "novelty": 3}
    assert StepContract.from_json(json.dumps(document)).schema == "1.7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "2.0"}, "schema 2.0 is not supported; this stepcell reads 1.x"),
        ({"schema": None}, "malformed"),
        ({"states": [{"name": "h"}]}, r"missing required field `shape` - at `\$.states\[0\]`"),
        ({"states": [{"name": "h", "shape": [1.5]}]}, "malformed"),
        ({"states": [{"name": "h", "shape": ["time"]}]}, r"uses \['time'\], which no input defines"),
        ({"states": [{"name": "h", "shape": ["import os"]}]}, "not an expression"),
        ({"states": [{"name": "h", "shape": [1], "init": "random"}]}, "malformed"),
        ({"states": [{"name": "h", "shape": [1]}, {"name": "h", "shape": [1]}]}, r"got twice: \['h'\]"),
        ({"precision": "int4"}, "malformed"),
    ],
)
def test_bad_documents(contract: StepContract, change: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        StepContract.from_json(json.dumps(json.loads(contract.to_json()) | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"schema"', "\x00"])
def test_no_documents(text: str) -> None:
    with pytest.raises(ContractError, match="malformed"):
        StepContract.from_json(text)


def test_state_names() -> None:
    assert state_names([("h",)]) == ["h"]
    assert state_names([("h", "c"), ("h",)]) == ["h0", "c0", "h1"]
    assert state_names([("h",)] * 11)[:2] == ["h00", "h01"]


def test_prefix_pair_sorts_alike() -> None:
    states = [StateSpec(name=name, shape=(1,)) for name in ["h", "h2", "h10", "enc.h", "enc.hidden", "c"]]
    by_input = [s.name for s in sorted(states, key=lambda s: s.input)]
    assert by_input == [s.name for s in sorted(states, key=lambda s: s.output)]


def test_specs_cannot_be_changed(contract: StepContract) -> None:
    with pytest.raises(AttributeError):
        contract.states[0].name = "other"  # type: ignore[misc]
    assert msgspec.structs.replace(contract.states[0], name="other").input == "state_in.other"
