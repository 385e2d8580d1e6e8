"""Memory that a client and a server on the same machine share: the frame and the answer of one request at a time."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Mapping
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError, OutputError, StepcellError
from stepcell.files import human_size
from stepcell.runtime.serving.protocol import STEPPED

__all__ = ["FrameMemory", "SharedFrames", "Tensor"]

_ALIGNED = 64
_FOLDER = "/dev/shm"


class Tensor(NamedTuple):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, array: NDArray[Any]) -> Tensor:
        """Those of an array."""
        return cls(array.shape, array.dtype)

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Place(NamedTuple):
    """Where an array lies."""

    tensor: Tensor
    offset: int


class FrameMemory:
    """A region with a place for each input and output of a frame of one size.

    Args:
        inputs, outputs: by name; `STEPPED` among the outputs.

    Attributes:
        name: under which the server knows it.
        key: of the system.
        size: bytes.
        inputs, outputs: their places.

    Raises:
        OutputError: the system has no room for it.
    """

    def __init__(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self.size = 0
        self.inputs, self.outputs = self._placed(inputs), self._placed(outputs)
        self.name = f"stepcell-client-{secrets.token_hex(8)}"
        self.key = f"/{self.name}"
        try:
            room = os.statvfs(_FOLDER)
            if room.f_bavail * room.f_frsize < self.size:  # a write would end the process then
                raise OutputError(
                    f"{_FOLDER}: no room for {human_size(self.size)} to share with the server",
                    hint="in a container: docker run --shm-size 1g",
                )
            self._memory = SharedMemory(self.name, create=True, size=self.size)
        except OSError as error:
            raise OutputError(f"{_FOLDER}: cannot be shared with the server ({error.strerror})") from error

    def fits(self, arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Whether these are the inputs that it has places for."""
        return {name: place.tensor for name, place in self.inputs.items()} == {
            name: Tensor.of(array) for name, array in arrays.items()
        }

    def write(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put the inputs in place, and take away the mark of the last answer."""
        for name, array in arrays.items():
            self._view(self.inputs[name])[...] = array
        self._view(self.outputs[STEPPED])[...] = -2  # the number of no frame, nor of a check

    def read(self, answered: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
        """Copies of the outputs. The caller has to compare `STEPPED`, which the server writes last: a server that drops
        its outputs leaves the answer to an earlier frame where it was, and says that all went well.

        Args:
            answered: what the server says of each output.

        Raises:
            InputError: other outputs than there are places for.
        """
        if answered != {name: place.tensor for name, place in self.outputs.items()}:
            raise InputError(f"expected {_listed(self.outputs)}, got {_listed(answered)}")
        return {name: self._view(place).copy() for name, place in self.outputs.items()}

    def close(self) -> None:
        """Give it back to the system, once no process has it open."""
        self._memory.close()
        self._memory.unlink()

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Place]:
        places = {}
        for name, tensor in tensors.items():
            places[name] = Place(tensor, self.size)
            self.size += -(-tensor.size // _ALIGNED) * _ALIGNED
        return places

    def _view(self, place: Place) -> NDArray[Any]:
        return np.ndarray(place.tensor.shape, place.tensor.dtype, self._memory.buf, place.offset)


class SharedFrames:
    """The memory of one stream. The first frame of a size is sent without it, which shows how large the answers are.

    After a request that was not answered the memory is given up: the server may still read the frame, or write the
    answer, when the place belongs to another one.

    Args:
        register, unregister: tell the server of a region.
    """

    def __init__(self, register: Callable[[FrameMemory], None], unregister: Callable[[FrameMemory], None]) -> None:
        self._register, self._unregister = register, unregister
        self._memory: FrameMemory | None = None
        self._known: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None  # inputs and outputs of a frame
        self._old: list[FrameMemory] = []  # that the server may still use

    def memory_for(self, arrays: Mapping[str, NDArray[Any]]) -> FrameMemory | None:
        """The region with these inputs in it; None: the size of the answers is not known.

        Raises:
            InputError: the server does not see the memory of this machine.
            NotAnswered: as of `Transport.infer`.
            OutputError: the system has no room for it.
        """
        if self._memory is None or not self._memory.fits(arrays):
            self._give_up()
            if self._known is None or self._known[0] != _tensors(arrays):
                return None
            memory = FrameMemory(*self._known)
            try:
                self._register(memory)
            except StepcellError:
                memory.close()
                raise
            self._memory = memory
        self._memory.write(arrays)
        return self._memory

    def answered(self, arrays: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """A frame was answered, so nothing of the requests before it is under way."""
        self._known = (_tensors(arrays), _tensors(outputs))
        while self._old:
            self._forget(self._old.pop())

    def abandon(self) -> None:
        """A request was not answered."""
        self._known = None  # so that the frame is sent without shared memory, by which the server may be another one
        self._give_up()

    def close(self) -> None:
        """Give all memory back."""
        self._give_up()
        while self._old:
            self._forget(self._old.pop())

    def _give_up(self) -> None:
        if self._memory is not None:
            self._old.append(self._memory)
        self._memory = None

    def _forget(self, memory: FrameMemory) -> None:
        self._unregister(memory)
        memory.close()


def _listed(tensors: Mapping[str, Tensor | Place]) -> str:
    found = {name: each.tensor if isinstance(each, Place) else each for name, each in tensors.items()}
    return ", ".join(f"{name} {each.shape} {each.dtype}" for name, each in found.items()) or "nothing"


def _tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: Tensor.of(array) for name, array in arrays.items()}
