"""Streams in slots: every answer is the one of a loop of its own, or a named error."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell import StepLoop
from stepcell.errors import DeviceError
from stepcell.runtime.serving.protocol import CHECK, FrameRequest, RefusedFrame
from stepcell.runtime.serving.snapshot_store import SnapshotStore
from stepcell.runtime.serving.snapshots import StreamSnapshots
from stepcell.runtime.serving.stream_table import StreamTable
from stepcell.runtime.serving.wire import Wire
from tests.runtime.serving.serving_model import alone, clip, order_model

IDLE = 30.0
EVERY = 5
FRAMES = clip(0, 40)


class Server:
    """A table on a loop of its own; `now` is its clock."""

    def __init__(self, model: Path, folder: Path | None, slots: int = 3) -> None:
        self.now = 0.0
        self.loop = StepLoop.open(model, slots=slots, threads=1)
        snapshots = None
        if folder is not None:
            snapshots = StreamSnapshots(self.loop, SnapshotStore(folder, keep=3600), EVERY)
        wire = Wire(self.loop.contract, slots, pixels=False)
        self.table = StreamTable(
            self.loop,
            wire,
            slots=slots,
            sample={"x": FRAMES[0]},
            idle=IDLE,
            snapshots=snapshots,
            clock=lambda: self.now,
        )
        self.snapshots = snapshots

    def send(self, *requests: FrameRequest) -> list[Any]:
        answers = self.table.step(requests)
        if self.snapshots is not None:
            self.snapshots.flush()
        return [
            f"{answer.name}{'' if answer.frame is None else f' {answer.frame}'}"
            if isinstance(answer, RefusedFrame)
            else answer["y"]
            for answer in answers
        ]

    def kill(self) -> None:
        """As SIGKILL, but files that are being written get finished."""
        if self.snapshots is not None:
            self.snapshots.close()
        self.loop.close()


def frame(number: int, stream: int = 1, client: int = 7, frames: Any = FRAMES, **flags: bool) -> FrameRequest:
    return FrameRequest(stream, client, number, {"x": frames[number]}, **flags)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import _write_model

    return order_model(tmp_path_factory.mktemp("model") / "order.onnx", _write_model)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Any]:
    return alone(model, FRAMES)


@pytest.fixture
def make(model: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def server(folder: Path | None = None, slots: int = 3) -> Server:
        made.append(Server(model, folder, slots))
        return made[-1]

    yield server
    for each in made:
        each.kill()


def equal(found: list[Any], *wanted: Any) -> bool:
    return len(found) == len(wanted) and all(
        one == other if isinstance(one, str) or isinstance(other, str) else np.array_equal(one, other)
        for one, other in zip(found, wanted, strict=True)
    )


def run(server: Server, first: int, count: int, **who: Any) -> list[Any]:
    return [server.send(frame(number, start=number == first, **who))[0] for number in range(first, first + count)]


def test_streams_equal_loops_of_their_own(make: Callable[..., Server], model: Path) -> None:
    server, clips = make(), [clip(seed, 20) for seed in range(3)]
    wanted = [alone(model, frames) for frames in clips]
    for number in range(20):
        batch = [frame(number, stream, frames=clips[stream - 1], start=number == 0) for stream in (1, 2, 3)]
        assert equal(server.send(*batch), *(each[number] for each in wanted))
    assert server.table.counts.frames == 60


def test_a_retry_of_the_last_frame_is_not_stepped_twice(make: Callable[..., Server], expected: list[Any]) -> None:
    server = make()
    assert equal(server.send(frame(0, start=True)), expected[0])
    assert equal(server.send(frame(0, start=True)), expected[0])  # START too: its answer was lost
    assert equal(server.send(frame(1)), expected[1])
    assert equal(server.send(frame(1), frame(1), frame(2)), *expected[1:2], *expected[1:3])  # in one batch
    assert equal(server.send(frame(3)), expected[3])
    assert (server.table.counts.frames, server.table.counts.repeated) == (4, 3)


def test_order_is_kept_or_refused(make: Callable[..., Server], expected: list[Any]) -> None:
    server = make()
    run(server, 0, 3)
    assert equal(server.send(frame(4)), "OUT_OF_STEP 3")
    assert equal(server.send(frame(0)), "OUT_OF_STEP 3")
    assert equal(server.send(frame(4), frame(3), frame(4)), "OUT_OF_STEP 3", expected[3], expected[4])
    assert equal(server.send(FrameRequest(1, 7, -2, {})), "OUT_OF_STEP 5")


def test_start_is_the_only_reset(make: Callable[..., Server], expected: list[Any]) -> None:
    server = make()
    assert equal(server.send(frame(0)), "STATE_LOST")  # a START that was lost
    run(server, 0, 3)
    assert equal(server.send(frame(3, start=True)), expected[3])  # on a later frame it says "perhaps another server"
    assert equal(server.send(frame(0, start=True)), "OUT_OF_STEP 4")  # a delayed copy of the first request
    assert equal(server.send(frame(4)), expected[4])


def test_two_clients_with_one_id(make: Callable[..., Server], expected: list[Any]) -> None:
    server, other = make(), clip(1, 10)
    run(server, 0, 3)
    for number, start in ((0, True), (3, True), (2, False), (3, False)):
        assert equal(server.send(frame(number, client=8, frames=other, start=start)), "OUT_OF_STEP")
    assert equal(server.send(frame(3), frame(3, client=8, frames=other)), expected[3], "OUT_OF_STEP")


def test_a_full_table_gives_up_the_longest_idle_stream(
    make: Callable[..., Server], expected: list[Any], tmp_path: Path
) -> None:
    server = make(tmp_path)
    for stream in (1, 2, 3):
        server.now = stream
        run(server, 0, 3, stream=stream)
    server.now = IDLE
    assert equal(server.send(frame(0, 4, start=True)), "FULL")
    server.now = IDLE + 1.5  # stream 1 is idle for longer than 30 s
    assert equal(server.send(frame(0, 4, start=True), frame(0, 5, start=True)), expected[0], "FULL")
    server.now += IDLE
    assert equal(server.send(frame(3, 1, start=True)), expected[3])  # it comes back at its frame, in the slot of 2
    assert equal(server.send(frame(2, 2, start=True)), "NO_SNAPSHOT")  # no answer to 2: needs a state before it
    assert (server.table.counts.evicted, server.table.counts.resumed) == (2, 1)


def test_a_stream_with_a_frame_in_the_batch_is_not_idle(make: Callable[..., Server], expected: list[Any]) -> None:
    server = make(slots=1)
    run(server, 0, 3)
    server.now = 2 * IDLE
    assert equal(server.send(frame(0, 2, start=True), frame(3)), "FULL", expected[3])


def test_the_end_frees_the_slot_and_the_snapshots(
    make: Callable[..., Server], expected: list[Any], tmp_path: Path
) -> None:
    server = make(tmp_path, slots=1)
    run(server, 0, 12)
    assert equal(server.send(frame(11, end=True)), expected[11])  # the last frame again, with END: not stepped twice
    assert equal(server.send(frame(12)), "NO_SNAPSHOT")
    assert equal(server.send(frame(0, 2, start=True)), expected[0])
    server.kill()
    assert list(tmp_path.iterdir()) == []


def test_thousands_of_starts_without_an_end(make: Callable[..., Server]) -> None:
    server = make()
    for stream in range(1, 2_001):
        server.now += IDLE
        assert not isinstance(server.send(frame(0, stream, start=True))[0], str)
    assert len(server.table) == 3
    assert len(server.loop.slots) == 3


def test_evicted_streams_wait_for_a_slow_disk(make: Callable[..., Server], tmp_path: Path) -> None:
    """Instead of copies of all their states in memory."""
    server = make(tmp_path, slots=1)
    for stream in range(1, 31):
        server.now += IDLE
        server.table.step([frame(0, stream, start=True)])
    server.kill()
    assert len(list(tmp_path.iterdir())) == 29


def test_old_snapshots_are_removed_and_foreign_files_are_not(make: Callable[..., Server], tmp_path: Path) -> None:
    foreign = [tmp_path / name for name in ("notes.txt", f"{9:016x}-5.safetensors")]
    for path in foreign:
        path.write_text("mine")
    store = SnapshotStore(tmp_path, keep=3600)
    server = make(tmp_path)
    run(server, 0, 7)
    (old,) = set(tmp_path.iterdir()) - set(foreign)
    for path in (*foreign, old):
        os.utime(path, (1, 1))
    assert store.sweep() == 1
    assert store.sweep() == 0
    assert set(tmp_path.iterdir()) == set(foreign)


def test_a_killed_server_continues_from_the_snapshot(
    make: Callable[..., Server], expected: list[Any], tmp_path: Path
) -> None:
    first, second = make(tmp_path), make(tmp_path, slots=2)
    run(first, 0, 13)
    first.kill()
    assert equal(second.send(frame(13, start=True)), "RESUMED_AT 10")
    assert equal(second.send(frame(13)), "OUT_OF_STEP 10")
    assert equal(run(second, 10, 5), *expected[10:15])


def test_a_server_that_is_stopped_loses_nothing(
    make: Callable[..., Server], expected: list[Any], tmp_path: Path
) -> None:
    first, second, third = make(tmp_path), make(tmp_path), make(tmp_path)
    run(first, 0, 13)
    first.table.close()
    assert equal(second.send(frame(13, start=True)), expected[13])
    assert equal(third.send(frame(12, start=True)), "RESUMED_AT 10")  # the answer to 12 was lost on the way


def test_a_stream_that_comes_back_to_a_server_with_an_older_state(
    make: Callable[..., Server], expected: list[Any], tmp_path: Path
) -> None:
    first, second = make(tmp_path), make(tmp_path)
    run(first, 0, 7)
    assert equal(second.send(frame(7, start=True)), "RESUMED_AT 5")
    assert equal(run(second, 5, 7), *expected[5:12])
    second.kill()
    assert equal(first.send(frame(12)), "RESUMED_AT 10")  # not its own, before frame 7
    assert equal(run(first, 10, 4), *expected[10:14])


def test_without_a_usable_snapshot_the_state_is_lost(make: Callable[..., Server], tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path)
    run(first, 0, 4)
    assert equal(second.send(frame(4, start=True)), "NO_SNAPSHOT")
    run(first, 0, 7, stream=2)
    first.kill()
    (file,) = tmp_path.iterdir()
    assert equal(second.send(frame(7, 2, client=8)), "STATE_LOST")  # another client with this id
    file.rename(tmp_path / f"{3:016x}-5.safetensors")
    assert equal(second.send(frame(7, 3)), "STATE_LOST")  # not the stream of its name
    (tmp_path / f"{4:016x}-5.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    assert equal(second.send(frame(7, 4)), "STATE_LOST")
    assert len(second.table) == 0
    assert not second.loop.slots


def test_a_damaged_snapshot_gives_way_to_the_one_before_it(
    make: Callable[..., Server], expected: list[Any], tmp_path: Path
) -> None:
    first, second = make(tmp_path), make(tmp_path)
    run(first, 0, 8)
    first.table.close()
    newest = tmp_path / f"{1:016x}-8.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    assert equal(second.send(frame(8, start=True)), "RESUMED_AT 5")
    assert equal(run(second, 5, 5), *expected[5:10])


def test_a_bad_frame_harms_neither_its_stream_nor_the_others(make: Callable[..., Server], expected: list[Any]) -> None:
    server = make()
    run(server, 0, 2)
    run(server, 0, 2, stream=2)
    nan, large = FRAMES.copy(), np.zeros((3, 1, 3, 4, 4), np.float32)
    nan[2, 0, 0, 0, 0] = np.nan
    assert equal(server.send(frame(2, frames=nan), frame(2, 2)), "BAD_FRAME", expected[2])
    assert equal(server.send(frame(2, frames=large), frame(3, 2)), "BAD_FRAME", expected[3])
    assert equal(server.send(FrameRequest(1, 7, 2, {"wrong": FRAMES[2]})), "BAD_FRAME")
    assert equal(server.send(frame(2)), expected[2])
    assert equal(server.send(frame(0, 3, frames=nan[2:], start=True)), "BAD_FRAME")
    assert len(server.table) == 2  # a stream whose first frame is refused has no slot


def test_another_size_once_no_stream_is_left(make: Callable[..., Server]) -> None:
    server, large = make(), np.ones((2, 1, 3, 4, 4), np.float32)
    run(server, 0, 2)
    assert equal(server.send(frame(0, 2, frames=large, start=True)), "BAD_FRAME")
    server.send(frame(1, end=True))
    assert equal(server.send(frame(0, 2, frames=large, start=True)), large[0])


def test_a_failing_device_leaves_the_state(
    make: Callable[..., Server], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make()
    run(server, 0, 2)

    def fail(_frames: object) -> Any:
        raise DeviceError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(server.loop, "step_slots", fail)
        assert equal(server.send(frame(2)), "FAILED")
    assert equal(server.send(frame(2)), expected[2])


def test_a_check_steps_a_frame_of_no_stream(
    make: Callable[..., Server], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, check = make(slots=2), FrameRequest(9, 0, CHECK, {})
    steps = []
    step_slots = server.loop.step_slots
    monkeypatch.setattr(server.loop, "step_slots", lambda frames: steps.append(1) or step_slots(frames))

    def checked() -> int:
        """How many frames a check stepped."""
        before = len(steps)
        assert server.table.step([check]) == [{}]
        return len(steps) - before

    assert checked() == 1
    large = np.ones((2, 1, 3, 4, 4), np.float32)
    assert not isinstance(server.send(frame(0, frames=large, start=True))[0], str)  # of another size than the check's
    assert [checked(), checked()] == [0, 1]  # frames of streams are as good
    server.send(frame(0, frames=large, end=True))
    run(server, 0, 3, stream=1)
    run(server, 0, 3, stream=2)
    assert [checked(), checked(), checked()] == [0, 1, 1]  # with all slots in use
    assert equal(server.send(frame(3, 1), frame(3, 2)), expected[3], expected[3])
    monkeypatch.setattr(server.loop, "step_slots", lambda _frames: (_ for _ in ()).throw(DeviceError("gone")))
    assert checked_answers(server, check) == ["", "FAILED"]


def checked_answers(server: Server, check: FrameRequest) -> list[str]:
    answers = [server.table.step([check])[0] for _ in range(2)]
    return [answer.name if isinstance(answer, RefusedFrame) else "" for answer in answers]


def test_a_full_disk_is_counted_and_streams_go_on(
    make: Callable[..., Server], expected: list[Any], tmp_path: Path
) -> None:
    server = make(tmp_path / "snapshots")
    (tmp_path / "snapshots").rmdir()
    assert equal(run(server, 0, 12), *expected[:12])
    server.kill()
    assert server.snapshots is not None
    assert (server.snapshots.written, server.snapshots.failed) == (0, 2)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_arrives_every_answer_is_right_or_named(
    make: Callable[..., Server], model: Path, tmp_path: Path, seed: int
) -> None:
    """Clients that share ids, skip, repeat, go back, forget START; servers that are killed, stopped and swapped."""
    rng = random.Random(seed)
    servers = [make(tmp_path, slots=2) for _ in range(2)]
    clips = {client: clip(client, 40) for client in range(1, 6)}
    wanted = {client: alone(model, frames) for client, frames in clips.items()}
    at = dict.fromkeys(clips, 0)
    ids = {client: rng.randint(1, 4) for client in clips}
    seen: Counter[str] = Counter()
    late: list[FrameRequest] = []
    for _ in range(1200):
        batch = []
        for client in rng.choices(list(clips), k=rng.randint(1, 3)):
            if rng.random() < 0.02 or at[client] >= 38:
                at[client], ids[client] = 0, rng.randint(1, 4)  # as after a restart, with an id that may be in use
            number = at[client] if rng.random() < 0.9 else max(0, at[client] + rng.randint(-6, 3))
            request = frame(
                min(number, 39), ids[client], client, clips[client],
                start=rng.random() < 0.2 or (number == 0 and rng.random() < 0.9), end=rng.random() < 0.02,
            )  # fmt: skip
            batch.append(request)
            if rng.random() < 0.1:
                late.append(request)
        if late and rng.random() < 0.2:
            batch.append(late.pop(rng.randrange(len(late))))
        index = rng.choice((0, 0, 0, 1))
        servers[index].now += rng.choice((0.1, 1, IDLE)) if rng.random() < 0.3 else 0
        for request, answer in zip(batch, servers[index].table.step(batch), strict=True):
            if isinstance(answer, RefusedFrame):
                seen[answer.name] += 1
                if answer.frame is not None:
                    at[request.client] = answer.frame
            else:
                seen["right"] += 1
                np.testing.assert_array_equal(answer["y"], wanted[request.client][request.number])
                at[request.client] = request.number + (rng.random() < 0.9)  # else the answer was lost
        if rng.random() < 0.02:
            if rng.random() < 0.3:
                servers[index].table.close()
            servers[index].kill()
            servers[index] = make(tmp_path, slots=2)
    print(f"seed {seed}: {dict(seen)}")
    assert seen["right"] > 400
    assert {"OUT_OF_STEP", "RESUMED_AT", "NO_SNAPSHOT", "FULL"} <= set(seen)
