"""The contract of a served model as its clients see it: a model without states, of pixels or of the model's tensors.

It travels in the server's configuration of the model, so that a client needs no file of it.
"""

from __future__ import annotations

import msgspec

from stepcell.contract import StepContract, TensorSpec
from stepcell.pixels import picture_channels
from stepcell.runtime.serving.wire import Port, Wire

__all__ = ["PARAMETER", "client_contract"]

PARAMETER = "contract"  # of config.pbtxt: the contract as sealed JSON
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
