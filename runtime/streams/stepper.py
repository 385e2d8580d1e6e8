"""Steps of streams: what a scheduler asks of a step loop here, or of one on a server."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.errors import StepcellError
from stepcell.runtime.backends.base import StepFuture
from stepcell.runtime.loop.latency import Latency
from stepcell.runtime.loop.slots import Slot
from stepcell.runtime.loop.snapshot import Snapshot
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.streams.non_finite import non_finite_rows
from stepcell.runtime.streams.reset_policy import Cause
from stepcell.runtime.streams.stream import Stream

__all__ = ["Arrays", "LoopStepper", "Stepper"]

Arrays = dict[str, NDArray[Any]]


class Stepper(Protocol):
    """Steps frames of several streams, each from a state of its own.

    Attributes:
        latency: durations of the steps.
    """

    latency: Latency

    @property
    def name(self) -> str:
        """The model, for messages."""
        ...

    @property
    def contract(self) -> StepContract:
        """What its frames and outputs are."""
        ...

    @property
    def description(self) -> str:
        """What computes the steps, for display."""
        ...

    @property
    def device(self) -> str: ...
    @property
    def overlaps(self) -> bool:
        """Whether a second step may be started before the outputs of the first are there."""
        ...

    @property
    def gives_pixels(self) -> bool:
        """Whether outputs that are pictures come as pixels instead of the model's tensors."""
        ...

    @property
    def checks_frames(self) -> bool:
        """Whether frames are to be checked for NaN and Inf."""
        ...

    def begin(self, streams: Sequence[Stream]) -> None:
        """Give each stream its initial state, or the one from which it is continued."""

    def start(self, inputs: Mapping[Stream, Arrays]) -> StepFuture[Mapping[Stream, Arrays | StepcellError]]:
        """Start a step.

        Returns:
            The outputs of each stream, or the error that ends this stream only.
        """
        ...

    def reset(self, stream: Stream, cause: Cause) -> None:
        """Set the state of a stream to its initial value, after the steps that were started."""

    def non_finite_states(self, streams: Collection[Stream]) -> Mapping[Stream, str]:
        """Streams whose states hold NaN or Inf, each with the name of such a state."""
        ...

    def capture(self, *, frame: int, metadata: Mapping[str, str]) -> tuple[Arrays, Snapshot]:
        """The states as they are now, for a snapshot."""
        ...

    def release(self, stream: Stream) -> None:
        """The stream has failed."""

    def interrupt(self) -> None:
        """Ask a step that runs in another thread to end with an error; returns at once."""

    def end(self) -> None:
        """All streams have ended."""


class LoopStepper:
    """Steps in a loop: one stream has it to itself, several are slots of one batch.

    A slot attached under the name of a stream continues from its states, and so does a loop without slots whose
    stream has a `start`; all other streams start from the initial states.

    Args:
        loop: for several streams opened with a slot for each.
    """

    gives_pixels = False

    def __init__(self, loop: StepLoop) -> None:
        self._loop = loop
        self._slots: dict[Stream, Slot] | None = None  # None: one stream has the loop to itself
        self.checks_frames: bool = loop.check_finite

    @property
    def latency(self) -> Latency:
        return self._loop.latency

    @latency.setter
    def latency(self, latency: Latency) -> None:
        self._loop.latency = latency

    @property
    def name(self) -> str:
        return self._loop.name

    @property
    def contract(self) -> StepContract:
        return self._loop.contract

    @property
    def description(self) -> str:
        return self._loop.description

    @property
    def device(self) -> str:
        return self._loop.device

    @property
    def overlaps(self) -> bool:
        return self._loop.overlaps

    def begin(self, streams: Sequence[Stream]) -> None:
        self._loop.check_finite = False  # each stream has a policy of its own
        if not any(stream.start for stream in streams):
            self._loop.reset()
        if len(streams) == 1:
            return
        self._slots = {}
        names = {stream.name: stream for stream in streams}
        for name, slot in self._loop.slots.items():
            if name in names:
                self._slots[names[name]] = slot
            else:
                self._loop.detach(slot)
        for stream in streams:
            if stream not in self._slots:
                self._slots[stream] = self._loop.attach(stream.name)
            elif not stream.start:
                self._loop.reset([self._slots[stream]])

    def start(self, inputs: Mapping[Stream, Arrays]) -> StepFuture[Mapping[Stream, Arrays | StepcellError]]:
        if self._slots is None:
            ((stream, arrays),) = inputs.items()
            alone = self._loop.step_async(**arrays)
            return StepFuture(lambda: {stream: alone.result()})
        slots = {stream: self._slots[stream] for stream in inputs}
        batch = self._loop.step_slots_async({slots[stream]: arrays for stream, arrays in inputs.items()})

        def collect() -> dict[Stream, Arrays | StepcellError]:
            found = batch.result()
            return {stream: found[slot] for stream, slot in slots.items()}

        return StepFuture(collect)

    def reset(self, stream: Stream, cause: Cause) -> None:
        if self._slots is not None:
            self._loop.reset([self._slots[stream]])
            return
        # A mask keeps the sizes, and so the buffers. A frame of another size needs states of another size, and a
        # model without an axis of streams takes no mask.
        known = self._loop.latency.first is not None and cause != "size"
        masks = all(state.batch_axis is not None for state in self._loop.contract.states)
        self._loop.reset([True] if known and masks else None)

    def non_finite_states(self, streams: Collection[Stream]) -> Mapping[Stream, str]:
        rows = non_finite_rows(self._loop.contract, self._loop.state())
        found = {stream: self._slots[stream].index if self._slots is not None else 0 for stream in streams}
        return {stream: rows[row] for stream, row in found.items() if row in rows}

    def capture(self, *, frame: int, metadata: Mapping[str, str]) -> tuple[Arrays, Snapshot]:
        return self._loop.capture(frame=frame, metadata=metadata)

    def release(self, stream: Stream) -> None:
        if self._slots is not None and stream in self._slots:
            self._loop.detach(self._slots.pop(stream))

    def interrupt(self) -> None:
        self._loop.interrupt()

    def end(self) -> None:
        self._loop.check_finite = self.checks_frames
