"""Step buffers: double-buffered I/O, events and the CUDA graph of the steps of one parity.

With two sets, the frame of one step is uploaded while the step before it runs and the outputs of the step before that
are downloaded. The work is on three streams, ordered by events; the host does not wait in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import Spec, StepContract
from stepcell.dims import resolve
from stepcell.runtime import cuda
from stepcell.runtime.backends.base import StepFuture
from stepcell.runtime.backends.tensorrt.state_buffers import Own
from stepcell.runtime.cuda import DeviceArray

__all__ = ["HostAndDevice", "StepBuffers"]


@dataclass(frozen=True)
class HostAndDevice:
    """The buffers of a data input or output: page-locked host memory and device memory of the same size."""

    host: cuda.PinnedArray
    device: cuda.DeviceBuffer


class StepBuffers:
    """Buffers, events and CUDA graph of the steps of one parity.

    Args:
        parity: 0 or 1; a step reads the state buffer of this number and writes the other one.
        contract: data inputs and outputs.
        symbols: value of every symbol in their shapes.
        own: registers a resource to be closed, and returns it.

    Attributes:
        inputs, outputs: by name.
        graph: the captured step; None: not captured.
        running: the step that uses these buffers, until its outputs were collected.
        started, uploaded, began, computed, finished: events recorded along a step, in this order.
    """

    def __init__(self, parity: int, contract: StepContract, symbols: Mapping[str, int], own: Own) -> None:
        self.parity = parity
        self.inputs = {spec.name: _allocate(spec, symbols, own) for spec in contract.inputs}
        self.outputs = {spec.name: _allocate(spec, symbols, own) for spec in contract.outputs}
        self.started, self.uploaded, self.began, self.computed, self.finished, self._ready = (
            own(cuda.Event()) for _ in range(6)
        )
        self.graph: cuda.Graph | None = None
        self.running: StepFuture[dict[str, NDArray[Any]]] | None = None
        self._held: list[DeviceArray] = []  # the caller's memory that the step reads

    def upload(self, inputs: Mapping[str, NDArray[Any] | DeviceArray], stream: cuda.Stream) -> None:
        """Queue copies of the inputs into the device buffers, also of arrays that are on the device.

        So the graph always reads the same addresses.
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
                cuda.copy_to_device(data.device, data.host, stream)
        self.uploaded.record(stream)

    def download(self, stream: cuda.Stream) -> None:
        """Queue copies of the outputs to the host, after the step."""
        stream.wait(self.computed)
        for data in self.outputs.values():
            cuda.copy_to_host(data.host, data.device, stream)
        self.finished.record(stream)

    def wait(self) -> None:
        """Wait until the step is done with these buffers and with the caller's memory."""
        self.finished.synchronize()
        self._held.clear()

    def milliseconds(self) -> dict[str, float]:
        """GPU time of the last step, which must be done."""
        return {
            "copy_in": self.uploaded.milliseconds_since(self.started),
            "compute": self.computed.milliseconds_since(self.began),
            "copy_out": self.finished.milliseconds_since(self.computed),
        }


def _allocate(spec: Spec, symbols: Mapping[str, int], own: Own) -> HostAndDevice:
    host = own(cuda.PinnedArray(resolve(spec.shape, symbols), spec.dtype))
    return HostAndDevice(host, own(cuda.DeviceBuffer(host.array.nbytes)))
