"""The contract of a served model as its clients see it: of frames and answers as they travel, and no states."""

from __future__ import annotations

import numpy as np
import pytest

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import ContractError
from stepcell.runtime.media.preprocess import Preprocessor, image_input
from stepcell.runtime.serving.client_contract import PARAMETER, ServedModel, client_contract
from stepcell.runtime.serving.wire import Wire


def model(picture: TensorSpec, *outputs: TensorSpec) -> StepContract:
    contract = StepContract(inputs=(picture,), outputs=outputs, states=(StateSpec(name="h", shape=("n", 4)),))
    contract.check()
    return contract


def seen_by_clients(contract: StepContract, *, pixels: bool) -> StepContract:
    """As it arrives."""
    text = client_contract(contract, Wire(contract, 2, pixels=pixels)).to_sealed_json()
    return StepContract.from_json(text)


def test_pixels_are_sent_as_they_are() -> None:
    """Padding, order of channels and range are the server's; a picture of a declared range comes as pixels."""
    picture = TensorSpec(
        name="x", shape=("n", 3, 1088, "w"), layout="NCHW", range=(0.0, 1.0), channels="BGR", pad_multiple=16
    )
    found = seen_by_clients(
        model(
            picture,
            TensorSpec(name="y", shape=("n", 3, 2176, "2 * w"), layout="NCHW", range=(0.0, 1.0), channels="BGR"),
            TensorSpec(name="labels", shape=("n", 1088, "w"), layout="NHW", dtype="int32"),
            TensorSpec(name="score", shape=(5, "n")),
        ),
        pixels=True,
    )
    frame = np.random.default_rng(0).integers(0, 256, (1080, 40, 3), np.uint8)
    assert np.array_equal(Preprocessor(image_input(found, 3), frame)(frame), frame[None])
    assert [(spec.name, spec.shape, spec.layout, spec.dtype) for spec in found.outputs] == [
        ("y", ("streams", 2176, "2 * w", 3), "NHWC", "uint8"),
        ("labels", ("streams", 1088, "w"), "NHW", "int32"),
        ("score", ("streams", 5), None, "float32"),
    ]
    assert not found.states


def test_tensors_keep_what_the_client_needs_to_make_them() -> None:
    picture = TensorSpec(name="x", shape=("n", 3, "h", "w"), layout="NCHW", range=(0.0, 1.0), mean=(0.5,), std=(0.25,))
    (spec,) = seen_by_clients(model(picture), pixels=False).inputs
    assert (spec.shape, spec.layout, spec.mean, spec.std) == (("streams", 3, "h", "w"), "NCHW", (0.5,), (0.25,))


def test_a_contract_that_was_changed_on_its_way_is_refused() -> None:
    contract = model(TensorSpec(name="x", shape=("n", 3, "h", "w"), layout="NCHW", range=(0.0, 1.0)))
    text = client_contract(contract, Wire(contract, 2, pixels=True)).to_sealed_json()
    with pytest.raises(ContractError, match="checksum"):
        StepContract.from_json(text.replace('"uint8"', '"int16"'))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("contract", "", "does not say what its frames are"),
        ("contract", "{}", "malformed contract"),
        ("pixels", "perhaps", r"malformed parameters of the model .*\$\.pixels"),
        ("slots", "0", r"malformed parameters of the model .*\$\.slots"),
        ("snapshot_every", "often", r"malformed parameters of the model .*\$\.snapshot_every"),
    ],
)
def test_what_a_server_says_of_its_model_is_not_trusted(name: str, text: str, message: str) -> None:
    contract = model(TensorSpec(name="x", shape=("n", 3, "h", "w"), layout="NCHW", range=(0.0, 1.0)))
    written = client_contract(contract, Wire(contract, 2, pixels=True)).to_sealed_json()
    parameters = {PARAMETER: written, "pixels": "True", "slots": "2", "device": "cpu"}
    served = ServedModel.from_parameters(parameters, "server: model")
    assert (served.pixels, served.slots, served.snapshot_every) == (True, 2, None)
    with pytest.raises(ContractError, match=rf"^server: model: .*{message}") as raised:
        ServedModel.from_parameters({**parameters, name: text}, "server: model")
    assert "stepcell triton-repo" in (raised.value.hint or "")
