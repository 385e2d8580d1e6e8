"""Back ends: the protocol that every back end implements, the future that a step returns, and names of devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.errors import StepcellError, UsageError
from stepcell.runtime.cuda import DeviceArray

__all__ = ["Backend", "Device", "Spin", "StepFuture"]

Spin = bool | Literal["in step"]  # whether threads spin while they wait for work: always, or until a step ends

T = TypeVar("T")


class StepFuture(Generic[T]):
    """The outputs of a step that has started.

    Args:
        collect: waits for the outputs and returns them; called once.
    """

    def __init__(self, collect: Callable[[], T]) -> None:
        self._collect: Callable[[], T] | None = collect
        self._result: T | StepcellError

    def result(self) -> T:
        """Wait for the outputs and return them. Further calls return the same object.

        Raises:
            DeviceError: the device failed in this step; further calls raise it again.
        """
        if self._collect is not None:
            collect, self._collect = self._collect, None
            try:
                self._result = collect()
            except StepcellError as error:
                self._result = error
        if isinstance(self._result, StepcellError):
            raise self._result
        return self._result


class Backend(Protocol):
    """A loaded model with its states, on one device.

    `StepLoop` checks all arguments before it calls a back end, and never calls two methods at the same time, except
    `interrupt`.

    Attributes:
        contract: with the dtypes that the back end runs in (a float16 model that runs in float32 has a float32
            contract).
        device: the device that runs the model: "cpu", "cuda:0".
        description: back end, version and device for display, for example "ONNX Runtime 1.31.1, CPU".
        overlaps: whether `enqueue` returns before the step is done, so that a second step may be started meanwhile.
        skips_idle: whether idle rows are not computed; those that hold no stream are then named as idle too.
    """

    contract: StepContract
    device: str
    overlaps: bool

    @property
    def description(self) -> str: ...

    @property
    def skips_idle(self) -> bool: ...

    def configure(self, symbols: Mapping[str, int]) -> None:
        """Fix the sizes, allocate all buffers and set the states to their initial values.

        It may be called again with other sizes.

        Args:
            symbols: value of every symbol of the contract.

        Raises:
            DeviceError: the buffers do not fit in memory.
            InputError: the model was built for other sizes (the profile of an engine).
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
        """One step. A step that fails leaves the states as they were.

        Args:
            inputs: C-contiguous, with the dtypes of the contract and the configured shapes.
            idle: rows of the batch axis that do not take part: their states stay as they are, bit by bit, and their
                outputs are undefined. Each costs a copy of its states on the device, unless `skips_idle`.

        Returns:
            The outputs by name. They belong to the caller: no later step writes to them.
        """
        ...

    def enqueue(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> StepFuture[dict[str, NDArray[Any]]]:
        """Start a step. Arrays on the host have been read when this returns.

        All later calls see the states after this step. An error of the device is raised by `result()`; it undoes the
        step unless a later one has started.
        """
        ...

    def step_on_device(self, inputs: Mapping[str, NDArray[Any] | DeviceArray]) -> dict[str, DeviceArray]:
        """Start a step whose outputs stay on the device. They are valid until the step after the next one starts.

        It returns at once: consumers of the arrays wait for them in stream order.

        Raises:
            UsageError: this back end returns its outputs on the host.
        """
        ...

    def interrupt(self) -> None:
        """Ask a step that runs in another thread to end with an error, if the device can do that; returns at once."""
        ...

    def reset(self, rows: Sequence[bool] | None = None) -> None:
        """Set the states to their initial values: all rows, or the rows of the batch axis that are True."""
        ...

    def read_state(self) -> dict[str, NDArray[Any]]:
        """A copy of every state, by name."""
        ...

    def write_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace every state. Names, dtypes and shapes are those of the contract."""
        ...

    def read_row(self, row: int) -> dict[str, NDArray[Any]]:
        """A copy of one row of every state, by name, with a batch axis of size 1."""
        ...

    def write_row(self, row: int, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace one row of every state. The others stay as they are, bit by bit.

        Args:
            state: as `read_row` returns it.
        """
        ...

    def close(self) -> None:
        """Free all memory. Calling it twice is allowed."""
        ...


@dataclass(frozen=True)
class Device:
    """A device: kind ("cpu" or "cuda") and number."""

    kind: str
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Device:
        """From `cpu`, `cuda` or `cuda:N`.

        Raises:
            UsageError: any other text.
        """
        match = re.fullmatch(r"(cpu)|cuda(?::(\d{1,3}))?", text)
        if match is None:
            raise UsageError(f"device: expected cpu, cuda or cuda:N, got {text!r}")
        return cls("cpu") if match[1] else cls("cuda", int(match[2] or 0))

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"
