"""What every second step uses of its own: buffers of inputs and outputs, events, and its CUDA graph.

With two of these a frame is uploaded while the frame before it is computed, and the outputs of the
one before that are downloaded: three streams, ordered by events and never by waiting on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import Spec, StepContract
from stepcell.dims import resolve
from stepcell.runtime import cuda
from stepcell.runtime.backends.step_future import Pending
from stepcell.runtime.cuda import DeviceArray

__all__ = ["Data", "Turn"]

Own = Callable[[Any], Any]  # registers something to be closed, and returns it


@dataclass(frozen=True)
class Data:
    """A data input or output: page-locked host memory and its copy on the device."""

    host: cuda.PinnedArray
    device: cuda.DeviceBuffer


class Turn:
    """Buffers, events and graph of the steps of one parity.

    Args:
        parity: 0 or 1; the states' buffer of this number is read, the other one written.
        contract, symbols: which inputs and outputs there are, and their sizes.
        own: for what must be closed.

    Attributes:
        graph: the step captured; None: not captured.
        pending: the step that uses this turn, until it has been waited for.
        started, uploaded, began, computed, finished: recorded along a step, in this order.
    """

    def __init__(self, parity: int, contract: StepContract, symbols: Mapping[str, int], own: Own) -> None:
        self.parity = parity
        self.inputs = {spec.name: _data(spec, symbols, own) for spec in contract.inputs}
        self.outputs = {spec.name: _data(spec, symbols, own) for spec in contract.outputs}
        self.started, self.uploaded, self.began, self.computed, self.finished, self._ready = (
            own(cuda.Event()) for _ in range(6)
        )
        self.graph: cuda.Graph | None = None
        self.pending: Pending[dict[str, NDArray[Any]]] | None = None
        self._held: list[DeviceArray] = []

    def upload(self, inputs: Mapping[str, NDArray[Any] | DeviceArray], stream: cuda.Stream) -> None:
        """Queue copies of the inputs to the device; those that are there are copied there.

        So a caller's memory may have any address, and a graph always reads the same one.
        """
        self.started.record(stream)
        for name, data in self.inputs.items():
            value = inputs[name]
            if isinstance(value, DeviceArray):
                if value.stream is not None:
                    self._ready.record_on(value.stream)
                    stream.wait(self._ready)
                cuda.copy_on_device(data.device.address, value.address, data.device.nbytes, stream)
                self._held.append(value)
            else:
                np.copyto(data.host.array, value)
                cuda.copy_to_device(data.device, data.host.array, stream)
        self.uploaded.record(stream)

    def download(self, stream: cuda.Stream) -> None:
        """Queue copies of the outputs to the host, behind the step."""
        stream.wait(self.computed)
        for data in self.outputs.values():
            cuda.copy_to_host(data.host.array, data.device, stream)
        self.finished.record(stream)

    def release(self) -> None:
        """Wait until nothing on the device uses this turn, nor the memory of a caller for it."""
        self.finished.synchronize()
        self._held.clear()

    def milliseconds(self) -> dict[str, float]:
        """Time on the GPU of the last step, which is done."""
        return {
            "copy_in": self.uploaded.milliseconds_since(self.started),
            "compute": self.computed.milliseconds_since(self.began),
            "copy_out": self.finished.milliseconds_since(self.computed),
        }


def _data(spec: Spec, symbols: Mapping[str, int], own: Own) -> Data:
    host = own(cuda.PinnedArray(resolve(spec.shape, symbols), spec.dtype))
    return Data(host, own(cuda.DeviceBuffer(host.array.nbytes)))
