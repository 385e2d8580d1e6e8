"""The states of one slot: read, replaced, and carried from loop to loop in a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import InputError, StateError, UsageError
from stepcell.runtime.loop.open_backend import open_backend
from stepcell.runtime.loop.slots import Slot
from stepcell.runtime.loop.snapshot import Snapshot, contract_hash, write_snapshot

Model = Callable[..., Path]
Arrays = Mapping[str, NDArray[Any]]
ONE = np.ones((1, 3, 2, 2), np.float32)


def frames(count: int, *shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((count, *shape), np.float32)


def bits(states: Arrays) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """States so that two are equal only bit by bit, NaN included."""
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in states.items()}


def step(loop: StepLoop, slot: Slot, x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return loop.step_slots({slot: {"x": x}})[slot]


@pytest.mark.parametrize("model", ["denoiser_onnx", "stack_onnx", "learned_onnx"])
def test_a_stream_travels_bit_by_bit(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """From a slot to a loop with another number of slots, in another row, before its first step and between steps, to a
    loop without slots and back; each stage steps on, and a loop of its own says what must come out.
    """
    onnx, path = request.getfixturevalue(model), tmp_path / "stream.safetensors"
    xs, others = frames(60, 1, 3, 16, 24), frames(60, 1, 3, 16, 24, seed=1)
    with StepLoop.open(onnx, threads=1) as alone:
        expected = [{**alone.step(x=x), **alone.state()} for x in xs]
        expected_others = [{**alone.step(x=x), **alone.state()} for x in others] if alone.reset() is None else []

    with StepLoop.open(onnx, threads=1, slots=3) as box:
        front, own = box.attach("front"), box.attach("camera")
        for number in range(20):
            outputs = box.step_slots({front: {"x": others[number]}, own: {"x": xs[number]}})
            assert bits({**outputs[own], **box.state(own)}) == bits(expected[number])
        box.save(path, own, frame=20, metadata={"url": "camera"})

    with StepLoop.open(onnx, threads=1, slots=5) as server:  # before its first step, with a neighbour that starts
        new, *_, late = (server.attach() for _ in range(4))
        snapshot = server.restore(path, late)
        assert (snapshot.frame, snapshot.metadata, snapshot.slots) == (20, {"url": "camera"}, {"camera": 0})
        assert late.index == 3
        assert bits(server.state(late)) == bits({name: expected[19][name] for name in server.state()})
        for number in range(20, 40):
            outputs = server.step_slots({late: {"x": xs[number]}, new: {"x": others[number - 20]}})
            assert bits(outputs[late] | server.state(late)) == bits(expected[number])
            assert bits(outputs[new] | server.state(new)) == bits(expected_others[number - 20])
        server.save(path, late, frame=40)

    with StepLoop.open(onnx, threads=1) as single:  # a loop without slots
        assert single.restore(path).frame == 40
        for number in range(40, 50):
            assert bits(single.step(x=xs[number]) | single.state()) == bits(expected[number])
        single.save(path, frame=50)

    with StepLoop.open(onnx, threads=1, slots=2) as back:  # while another stream runs
        first, second = back.attach(), back.attach()
        for x in others[:10]:
            step(back, first, x)
        before = bits(back.state(first))
        back.restore(path, second)
        assert bits(back.state(first)) == before
        for number in range(50, 60):
            outputs = back.step_slots({first: {"x": others[number - 40]}, second: {"x": xs[number]}})
            assert bits(outputs[second] | back.state(second)) == bits(expected[number])
            assert bits(outputs[first] | back.state(first)) == bits(expected_others[number - 40])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_in_any_row_stays_where_it_is(accumulator: Model, tmp_path: Path, dtype: str) -> None:
    """NaN with bits of its own in a neighbour is kept, a stream with NaN travels, and a good one overwrites it."""
    path, one = tmp_path / "stream.safetensors", ONE.astype(dtype)
    odd = (one * np.nan).view(f"u{one.itemsize}") | 5
    broken = {"h": odd.view(dtype)}
    with StepLoop.open(accumulator(dtype=dtype), slots=3, keep_float16=True) as loop:
        a, b, c = loop.attach("a"), loop.attach("b"), loop.attach("c")
        loop.step_slots({a: {"x": one}, b: {"x": 2 * one}, c: {"x": 3 * one}})
        loop.load_state(broken, b)
        assert bits(loop.state(b)) == bits(broken)
        loop.load_state({"h": 7 * one}, c)
        assert bits(loop.state(b)) == bits(broken)
        assert bits(loop.state(a)) == bits({"h": one})
        loop.save(path, b)
        loop.load_state(loop.state(a), b)
        outputs = loop.step_slots({slot: {"x": one} for slot in (a, b, c)})
        assert [outputs[slot]["y"].max() for slot in (a, b, c)] == [2, 2, 8]
        loop.restore(path, a)
        assert (bits(loop.state(a)), bits(loop.state(b))) == (bits(broken), bits({"h": 2 * one}))


@pytest.mark.parametrize("kind", ["onnxruntime", "ncnn", "auto"])
def test_a_row_is_read_and_written_without_the_others(
    stack_onnx: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "onnxruntime":
        pytest.importorskip("ncnn")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # of what is faster here
    monkeypatch.setenv("STEPCELL_BACKEND", "auto")
    backend = open_backend(stack_onnx, "cpu", allow_fallback=False, keep_float16=False, threads=1, backend=kind)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the whole batch was copied")

    xs = frames(8, 1, 3, 16, 24)
    with StepLoop(backend, slots=3) as loop:
        a, b, c = (loop.attach(name) for name in "abc")
        for x in xs:
            loop.step_slots({a: {"x": x}, c: {"x": 1 - x}})
        every = loop.state()
        with monkeypatch.context() as patch:
            patch.setattr(backend, "read_state", refuse)
            patch.setattr(backend, "write_state", refuse)
            for slot in (a, b, c):
                assert bits(loop.state(slot)) == bits({name: array[[slot.index]] for name, array in every.items()})
            moved = loop.state(c)
            loop.load_state(moved, b)
            moved["h0"][...] = np.nan  # a copy
            with pytest.raises(StateError, match=r"h0: expected shape .* as in the other slots"):
                loop.load_state({name: array[..., 1:] for name, array in moved.items()}, b)
        every = {name: array[[0, 2, 2]] for name, array in every.items()}
        assert bits(loop.state()) == bits(every)
        outputs = loop.step_slots({b: {"x": xs[0]}, c: {"x": xs[0]}})
        assert bits(outputs[b]) == bits(outputs[c])
        loop.reset([a, c])
        assert bits(loop.state(b)) != bits(loop.state(a)) == bits(loop.state(c))


def test_several_streams_wait_for_the_first_step(learned_onnx: Path, tmp_path: Path) -> None:
    """Loaded ones keep their states, one that is reset or attached meanwhile starts, and a snapshot has them all."""
    xs = frames(4, 1, 3, 10, 14)
    with StepLoop.open(learned_onnx) as alone:
        states = [alone.state() for x in xs if alone.step(x=x)]
        alone.reset()
        start = alone.step(x=xs[3])
        alone.load_state(states[0])
        second = alone.step(x=xs[3])
    with StepLoop.open(learned_onnx, slots=4) as loop:
        a, b, c = loop.attach("a"), loop.attach("b"), loop.attach("c")
        loop.load_state(states[0], a)
        loop.load_state(states[1], b)
        loop.load_state(states[2], b)
        loop.load_state(states[1], c)
        loop.reset([c])
        assert bits(loop.state(b)) == bits(states[2])
        loop.save(tmp_path / "all.safetensors")
        outputs = loop.step_slots({a: {"x": xs[3]}, c: {"x": xs[3]}, loop.attach("d"): {"x": xs[3]}})
        assert bits(outputs[a]) == bits(second)
        assert bits(outputs[c]) == bits(outputs[loop.slots["d"]]) == bits(start)
        assert bits(loop.state(b)) == bits(states[2]), "it had no frame"
    with StepLoop.open(learned_onnx, slots=4) as other:
        other.restore(tmp_path / "all.safetensors")
        assert bits(other.state(other.slots["b"])) == bits(states[2])
        assert bits(step(other, other.slots["a"], xs[3])) == bits(second)


def test_what_is_refused_changes_nothing(accumulator: Model, denoiser_onnx: Path, tmp_path: Path) -> None:
    path, large = tmp_path / "stream.safetensors", np.ones((1, 3, 4, 4), np.float32)
    with StepLoop.open(accumulator(), slots=2) as loop:
        gone, slot = loop.attach("gone"), loop.attach("front")
        loop.detach(gone)
        with pytest.raises(StateError, match="no step has run yet"):
            loop.state(slot)
        step(loop, slot, ONE)
        calls: list[Callable[[Slot], Any]] = [
            loop.state,
            lambda slot: loop.load_state({"h": ONE}, slot),
            lambda slot: loop.save(path, slot),
            lambda slot: loop.restore(path, slot),
        ]
        for call in calls:
            with pytest.raises(StateError, match="'gone' is not attached"):
                call(gone)
        for state, said in (
            ({"h": large}, r"h: expected shape \(1, 3, 2, 2\) as in the other slots, got \(1, 3, 4, 4\)"),
            ({"h": np.ones((2, 3, 2, 2), np.float32)}, "h: expected 1 stream on axis 0"),
            ({"h": np.ones((1, 5, 2, 2), np.float32)}, "h: expected float32 of shape"),
            ({"h": np.ones((1, 3, 2, 2), np.int32)}, "h: expected float32 of shape"),
            ({"g": ONE}, "states: expected h, got g"),
        ):
            with pytest.raises(StateError, match=said):
                loop.load_state(state, slot)
        assert bits(loop.state(slot)) == bits({"h": ONE})
    with StepLoop.open(accumulator()) as alone:
        alone.step(x=large)
        alone.save(path)
    with StepLoop.open(accumulator(), slots=2) as loop:
        loop.restore(path, loop.attach("early"))
        with pytest.raises(StateError, match="other slots"):
            loop.load_state({"h": ONE}, loop.attach("other size"))
        with pytest.raises(StateError, match=r"h: expected shape \(2, 3, 2, 2\) for these inputs, got \(2, 3, 4, 4\)"):
            step(loop, loop.slots["early"], ONE)
    with StepLoop.open(denoiser_onnx, slots=2) as loop, pytest.raises(StateError, match="a snapshot of another model"):
        loop.restore(path, loop.attach())


def test_loops_that_do_not_fit_are_named(accumulator: Model, tmp_path: Path) -> None:
    one, many = tmp_path / "one.safetensors", tmp_path / "many.safetensors"
    with StepLoop.open(accumulator(), slots=2) as loop:
        step(loop, loop.attach("a"), ONE)
        loop.save(one, loop.slots["a"])
        loop.save(many)
    with StepLoop.open(accumulator(), slots=3) as loop:
        slot = loop.attach("mine")
        with pytest.raises(StateError, match="holds the states of 2 streams, and slot mine takes those of one"):
            loop.restore(many, slot)
        with pytest.raises(StateError, match="slots=1, this one has slots=3") as caught:
            loop.restore(one)
        assert "loop.restore(path, loop.attach())" in str(caught.value.hint)
        loop.restore(one, slot)
    with StepLoop.open(accumulator()) as plain:
        stranger = Slot(0, "a")
        for call in (lambda: plain.state(stranger), lambda: plain.restore(one, stranger)):
            with pytest.raises(UsageError, match="opened without slots"):
                call()
        plain.step(x=np.ones((2, 3, 2, 2), np.float32))
        with pytest.raises(StateError, match=r"expected shape \(2, 3, 2, 2\) for these inputs, got \(1, 3, 2, 2\)"):
            plain.restore(one)
        plain.save(many)  # two rows that are no slots
    with StepLoop.open(accumulator(), slots=3) as loop, pytest.raises(StateError, match="the states of 2 streams"):
        loop.restore(many, loop.attach())
    with StepLoop.open(accumulator(), slots=1) as loop:
        assert loop.restore(one).slots == {"a": 0}
        assert bits(loop.state(loop.slots["a"])) == bits({"h": ONE}), "one slot is the whole loop"


@pytest.mark.parametrize("states", [{"g": ONE}, {"h": ONE[0]}, {"h": np.ones((2, 3, 2, 2), np.float32)}])
def test_a_file_whose_header_lies(accumulator: Model, tmp_path: Path, states: dict[str, NDArray[Any]]) -> None:
    path = tmp_path / "stream.safetensors"
    with StepLoop.open(accumulator(), slots=2) as loop:
        slot = loop.attach()
        for rows in (None, 1):
            write_snapshot(path, states, Snapshot(contract_hash=contract_hash(loop.contract), rows=rows))
            with pytest.raises(StateError):
                loop.restore(path, slot)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(InputError, match="is not a complete"):
            loop.restore(path, slot)


def test_streams_on_another_axis(write_model: Model, tmp_path: Path) -> None:
    """Layers first, streams second, as in torch.nn.GRU."""
    from onnx import helper

    path = tmp_path / "stream.safetensors"
    shape = (2, "batch", 3)
    (x, y), state = (TensorSpec(name=name, shape=shape, dtype="float32", batch_axis=1) for name in "xy"), "h"
    contract = StepContract(
        inputs=(x,), outputs=(y,), states=(StateSpec(name=state, shape=shape, dtype="float32", batch_axis=1),)
    )
    nodes = [helper.make_node("Add", ["state_in.h", "x"], ["y"]), helper.make_node("Identity", ["y"], ["state_out.h"])]
    onnx = write_model(tmp_path / "layers.onnx", contract, nodes)
    frame = np.arange(6, dtype=np.float32).reshape(2, 1, 3)
    with StepLoop.open(onnx, slots=3) as loop:
        a, b = loop.attach(), loop.attach()
        loop.load_state({"h": 10 * frame}, b)
        outputs = loop.step_slots({a: {"x": frame}, b: {"x": frame}})
        assert bits(outputs[b]) == bits({"y": 11 * frame})
        assert bits(loop.state(b)) == bits({"h": 11 * frame})
        assert bits(loop.state(a)) == bits({"h": frame})
        loop.save(path, b)
    with StepLoop.open(onnx) as single:
        single.restore(path)
        assert bits(single.state()) == bits({"h": 11 * frame})
