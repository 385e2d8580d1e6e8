"""The contract of a served model as its clients see it: a model without states, of pixels or of the model's tensors.

It travels in the server's configuration of the model, so that a client needs no file of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import ContractError
from stepcell.pixels import picture_channels
from stepcell.runtime.serving.wire import Port, Wire

__all__ = ["PARAMETER", "ServedModel", "client_contract"]

PARAMETER = "contract"  # of config.pbtxt: the contract as sealed JSON
_AGAIN = "write its repository with this version: stepcell triton-repo, without --implicit-state"


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What a server's configuration says of a model.

    Attributes:
        contract: as clients see it.
        pixels: whether frames are sent and answered as pixels.
        slots: streams of one of its processes.
        snapshot_every: frames between two snapshots of a stream; None: none are written.
    """

    contract: StepContract
    pixels: bool
    slots: Annotated[int, msgspec.Meta(ge=1)]
    snapshot_every: Annotated[int, msgspec.Meta(ge=1)] | None = None

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], subject: str) -> ServedModel:
        """From the parameters of config.pbtxt, which come from a server.

        Args:
            subject: server and model, for messages.

        Raises:
            ContractError: one is missing, damaged or malformed.
        """
        if not parameters.get(PARAMETER):
            raise ContractError(f"{subject}: the server does not say what its frames are", hint=_AGAIN)
        try:
            contract = StepContract.from_json(parameters[PARAMETER], subject=subject)
        except ContractError as error:
            raise ContractError(error.message, hint=_AGAIN) from error
        values = {name: text for name, text in parameters.items() if name in cls.__struct_fields__}
        try:
            return msgspec.convert({**values, PARAMETER: contract}, cls, strict=False)
        except msgspec.ValidationError as error:
            raise ContractError(f"{subject}: malformed parameters of the model ({error})", hint=_AGAIN) from error


_STREAMS = "streams"  # size of the first axis


def client_contract(contract: StepContract, wire: Wire) -> StepContract:
    """What the frames and answers of one stream are; the first axis of each counts streams.

    Args:
        contract: of the model.
        wire: how frames are sent.
    """
    return StepContract(
        family=contract.family,
        precision=contract.precision,
        inputs=tuple(_as_sent(port) for port in wire.inputs),
        outputs=tuple(_as_sent(port) for port in wire.outputs),
        states=(),
        graph_sha256=contract.graph_sha256,
    )


def _as_sent(port: Port) -> TensorSpec:
    spec, layout = port.spec, port.spec.layout or ""
    if port.pixels:
        sizes = [spec.shape[layout.index(letter)] for letter in "HW"]
        if spec.pad_multiple > 1:  # smaller frames are padded by the server
            sizes = [
                name if isinstance(size, int) else size for name, size in zip(("height", "width"), sizes, strict=True)
            ]
        shape = (_STREAMS, *sizes, picture_channels(spec) or 1)
        return TensorSpec(name=spec.name, shape=shape, dtype="uint8", layout="NHWC", batch_axis=0)
    moved: TensorSpec = msgspec.structs.replace(
        spec,
        shape=(_STREAMS, *spec.shape[: port.axis], *spec.shape[port.axis + 1 :]),
        layout=spec.layout if port.axis == 0 else None,  # others are no pictures
        batch_axis=0,
    )
    return moved
