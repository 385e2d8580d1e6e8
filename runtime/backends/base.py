"""What a step loop asks of the thing that runs the graph, and the names of devices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.errors import UsageError
from stepcell.runtime.backends.step_future import Pending
from stepcell.runtime.cuda import DeviceArray

__all__ = ["Backend", "Device"]


class Backend(Protocol):
    """One loaded model with its states, on one device.

    `StepLoop` checks every argument before it gets here and never calls two methods at once.

    Attributes:
        contract: dtypes as the back end really runs them (a float16 model in its float32 form
            has a float32 contract).
        device: what really runs: "cpu", "cuda:0".
        description: the same for people: "ONNX Runtime 1.31.1, CPU".
    """

    contract: StepContract
    device: str
    description: str

    def configure(self, symbols: Mapping[str, int]) -> None:
        """Fix the sizes: allocate every buffer, states at their initial value.

        May be called again, with other sizes.

        Raises:
            DeviceError: the buffers do not fit in memory.
            InputError: the model was built for other sizes (an engine's profile).
        """
        ...

    @property
    def input_stream(self) -> int | None:
        """Handle of the CUDA stream on which a step reads its inputs; None: it takes arrays on the host only.

        Raises:
            MissingDependencyError: the extra `cuda` is not installed.
        """
        ...

    def step(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> dict[str, NDArray[Any]]:
        """One step. Inputs have the contract's dtypes and the configured shapes, C-contiguous.

        The returned arrays belong to the caller: no later step writes to them. A step that
        fails leaves the states as they were before it.

        Args:
            idle: rows of the batch axis that take no part: their states stay as they were, bit by
                bit, and their outputs mean nothing. Each costs a copy of its states on the device;
                none is copied where all rows step.
        """
        ...

    def enqueue(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> Pending[dict[str, NDArray[Any]]]:
        """Begin a step: `step` in two halves. Arrays on the host have been read when this returns.

        Whatever is called next sees the states after this step. An error of the device comes out
        of `wait`; it undoes the step where none was begun after it.
        """
        ...

    def step_on_device(self, inputs: Mapping[str, NDArray[Any] | DeviceArray]) -> dict[str, DeviceArray]:
        """One step whose outputs stay on the device, good until the step after the next begins.

        It returns at once: who reads the arrays waits for them in stream order.

        Raises:
            UsageError: this back end has its outputs on the host.
        """
        ...

    def reset(self, slots: Sequence[bool] | None = None) -> None:
        """States to their initial value: all of them, or the rows of the batch axis that are True."""
        ...

    def read_state(self) -> dict[str, NDArray[Any]]:
        """A copy of every state, by name."""
        ...

    def write_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace every state; names, dtypes and shapes are the contract's."""
        ...

    def close(self) -> None:
        """Free device memory. Calling it twice is allowed."""
        ...


@dataclass(frozen=True)
class Device:
    """A device by kind ("cpu" or "cuda") and number."""

    kind: str
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Device:
        """`cpu`, `cuda` or `cuda:N`.

        Raises:
            UsageError: anything else.
        """
        match = re.fullmatch(r"(cpu)|cuda(?::(\d{1,3}))?", text)
        if match is None:
            raise UsageError(f"device: expected cpu, cuda or cuda:N, got {text!r}")
        return cls("cpu") if match[1] else cls("cuda", int(match[2] or 0))

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"
