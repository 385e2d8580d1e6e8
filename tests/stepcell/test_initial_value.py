"""Initial values in the contract document."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.contract import InitialValue, StateSpec, StepContract, TensorSpec
from stepcell.errors import ContractError


def contract(value: NDArray[np.generic], **state: object) -> StepContract:
    spec: dict[str, object] = {"shape": ("batch", 4, "height", "width"), **state}
    return StepContract(
        inputs=(TensorSpec(name="x", shape=("batch", 3, "height", "width")),),
        outputs=(),
        states=(StateSpec(name="h", init=InitialValue.of(value), **spec),),  # type: ignore[arg-type]
    )


VALUE = np.arange(4, dtype=np.float32).reshape(4, 1, 1)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_round_trip(dtype: str) -> None:
    again = StepContract.from_json(contract(VALUE.astype(dtype)).to_json())
    (state,) = again.states
    assert again == contract(VALUE.astype(dtype))
    initial = state.initial((2, 4, 5, 6))
    assert (initial.dtype, initial.shape) == (np.float32, (2, 4, 5, 6))
    np.testing.assert_array_equal(initial, np.broadcast_to(VALUE[None], (2, 4, 5, 6)))


def test_zeros_and_other_batch_axes() -> None:
    assert not StateSpec(name="h", shape=("batch", 3)).initial((2, 3)).any()
    state = StateSpec(name="h", shape=(2, "batch", 3), batch_axis=1, init=InitialValue.of(np.arange(6.0).reshape(2, 3)))
    initial = state.initial((2, 5, 3))
    for row in range(5):
        np.testing.assert_array_equal(initial[:, row], np.arange(6).reshape(2, 3))
    one = StateSpec(name="h", shape=("batch",), init=InitialValue.of(np.float32(3)))
    assert one.initial((4,)).tolist() == [3, 3, 3, 3]


def test_a_reader_without_stepcell_finds_plain_numbers() -> None:
    init = json.loads(contract(VALUE).to_json())["states"][0]["init"]
    found = np.frombuffer(base64.b64decode(init["data"]), "<f4").reshape(init["shape"])
    np.testing.assert_array_equal(found, VALUE)


def test_for_people_it_is_short() -> None:
    assert str(InitialValue.of(VALUE)) == "a value of shape 4 x 1 x 1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [4, 1]}, r"expected shape \(4, 'height', 'width'\), or 1"),
        ({"shape": [4, 2, 1]}, "expected shape"),
        ({"shape": [3, 1, 1]}, "expected shape"),
        ({"shape": [-4, 1, 1]}, "expected shape"),
        ({"data": ""}, "expected 16 bytes of float32, at most 4194304, got 0"),
        ({"dtype": "float64"}, "expected 32 bytes"),
        ({"data": base64.b64encode(np.full(4, np.nan, np.float32)).decode()}, "holds NaN or Inf"),
        ({"data": "***"}, "malformed contract"),
        ({"dtype": "int32"}, "malformed contract"),
    ],
    ids=str,
)
def test_damaged_values(change: dict[str, object], message: str) -> None:
    document = json.loads(contract(VALUE).to_json())
    document["states"][0]["init"].update(change)
    with pytest.raises(ContractError, match=message):
        StepContract.from_json(json.dumps(document))


def test_values_that_do_not_belong_in_a_contract() -> None:
    for made, message in (
        (contract(VALUE, dtype="int32"), "only floating-point states"),
        (contract(VALUE, batch_axis=9), "batch_axis 9 is not an axis"),
        (contract(np.zeros((4, 1024, 1024)), shape=("batch", 4, 1024, 1024)), "at most 4194304"),
    ):
        with pytest.raises(ContractError, match=message):
            made.check()
