"""Memory shared with a server: another view of it takes the server's place, and damages what a server can damage."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import InputError, OutputError
from stepcell.runtime.serving import shared_memory
from stepcell.runtime.serving.protocol import STEPPED
from stepcell.runtime.serving.shared_memory import FrameMemory, SharedFrames, Tensor

Arrays = dict[str, NDArray[Any]]


def frame(number: int, size: tuple[int, int] = (5, 7)) -> Arrays:
    return {"x": np.random.default_rng(number).integers(0, 256, (1, *size, 3), np.uint8)}


def answer(number: int, arrays: Arrays) -> Arrays:
    return {"y": arrays["x"].astype(np.float32) / 2, STEPPED: np.array([[number]], np.int64)}


class Server:
    """Reads frames from, and writes answers to, the regions that it was told of."""

    def __init__(self) -> None:
        self.regions: dict[str, SharedMemory] = {}
        self.told: list[str] = []

    def register(self, memory: FrameMemory) -> None:
        self.regions[memory.name] = SharedMemory(memory.key.lstrip("/"))
        self.told.append(memory.name)

    def unregister(self, memory: FrameMemory) -> None:
        self.regions.pop(memory.name).close()

    def step(self, memory: FrameMemory, number: int) -> dict[str, Tensor]:
        region = self.regions[memory.name]
        (tensor, offset) = memory.inputs["x"]
        arrays = {"x": np.ndarray(tensor.shape, tensor.dtype, region.buf, offset).copy()}
        found = answer(number, arrays)
        for name, array in found.items():
            np.ndarray(array.shape, array.dtype, region.buf, memory.outputs[name].offset)[...] = array
        return {name: Tensor.of(array) for name, array in found.items()}


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    for region in found.regions.values():
        region.close()


def left() -> list[Path]:
    return list(Path("/dev/shm").glob("stepcell-client-*"))


def test_frames_and_answers_pass_through_one_region(server: Server) -> None:
    shared = SharedFrames(server.register, server.unregister)
    assert shared.memory_for(frame(0)) is None, "how large the answers are is not known yet"
    shared.answered(frame(0), answer(0, frame(0)))
    for number in range(1, 6):
        memory = shared.memory_for(frame(number))
        assert memory is not None
        found = memory.read(server.step(memory, number))
        shared.answered(frame(number), found)
        wanted = answer(number, frame(number))
        assert all(
            np.array_equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted
        )
    assert len(server.told) == 1
    assert (f"/dev/shm/{server.told[0]}") in map(str, left())
    shared.close()
    assert not server.regions
    assert server.told[0] not in [path.name for path in left()]


def test_an_answer_that_was_not_written_does_not_pass_for_one(server: Server) -> None:
    """As of a server that drops its outputs and says that all went well: what lies there is the answer before."""
    shared = SharedFrames(server.register, server.unregister)
    shared.answered(frame(0), answer(0, frame(0)))
    memory = shared.memory_for(frame(1))
    assert memory is not None
    told = server.step(memory, 1)
    assert memory.read(told)[STEPPED] == 1
    assert shared.memory_for(frame(1)) is memory  # the same frame again, and the server does nothing
    assert memory.read(told)[STEPPED] < -1
    with pytest.raises(InputError, match=r"expected y \(1, 5, 7, 3\) float32.*got y"):
        memory.read({**told, "y": Tensor((1, 5, 7, 1), np.dtype(np.float32))})
    with pytest.raises(InputError, match="got nothing"):
        memory.read({})
    shared.close()


def test_another_size_gets_a_region_of_its_own(server: Server) -> None:
    shared = SharedFrames(server.register, server.unregister)
    for size in ((5, 7), (9, 3)):
        first = frame(0, size)
        assert shared.memory_for(first) is None
        shared.answered(first, answer(0, first))
        assert shared.memory_for(first) is not None
    assert len(server.told) == 2
    shared.answered(first, answer(0, first))
    assert list(server.regions) == server.told[1:], "the server was told that the first one is given up"
    shared.close()


def test_after_a_request_without_an_answer_the_region_is_no_longer_used(server: Server) -> None:
    """The server may still read the frame from it, or write the answer to it."""
    shared = SharedFrames(server.register, server.unregister)
    shared.answered(frame(0), answer(0, frame(0)))
    late = shared.memory_for(frame(1))
    assert late is not None
    shared.abandon()
    assert shared.memory_for(frame(1)) is None, "sent in the other way"
    assert late.name in server.regions, "until an answer says that nothing is under way"
    server.step(late, 1)
    shared.answered(frame(1), answer(1, frame(1)))
    assert late.name not in server.regions
    memory = shared.memory_for(frame(2))
    assert memory is not None
    assert memory.name != late.name
    shared.close()


def test_a_server_that_does_not_see_this_memory_leaves_nothing_behind() -> None:
    before = left()

    def refuse(_: FrameMemory) -> None:
        raise InputError("Unable to open shared memory region")

    shared = SharedFrames(refuse, lambda _: None)
    shared.answered(frame(0), answer(0, frame(0)))
    with pytest.raises(InputError, match="Unable to open"):
        shared.memory_for(frame(1))
    shared.close()
    assert left() == before


def test_a_system_without_room_is_an_error_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write beyond the room of /dev/shm ends the process with SIGBUS."""
    huge = Tensor((1 << 62,), np.dtype(np.uint8))
    with pytest.raises(OutputError, match=r"no room for .* to share"):
        FrameMemory({"x": huge}, {STEPPED: Tensor((1, 1), np.dtype(np.int64))})
    monkeypatch.setattr(shared_memory, "_FOLDER", "/nonexistent")
    with pytest.raises(OutputError, match="cannot be shared"):
        FrameMemory({"x": Tensor((1,), np.dtype(np.uint8))}, {})
