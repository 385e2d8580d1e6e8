"""Slots: streams that start and end independently in one batch, each with states of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from stepcell import StepLoop
from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import InputError, StateError, UsageError
from stepcell.runtime.backends.base import Device
from stepcell.runtime.backends.onnxruntime.backend import OrtBackend

Model = Callable[..., Path]
Array = NDArray[np.float32]
ONE = np.ones((1, 3, 2, 2), np.float32)


def frames(count: int, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).random((count, *shape), np.float32)


@pytest.fixture
def loop(accumulator: Model) -> Iterator[StepLoop]:
    """y = h' = h + x, three slots."""
    with StepLoop.open(accumulator(), slots=3) as opened:
        yield opened


def test_slots_equal_loops_of_their_own_at_different_rates(denoiser_onnx_float32: Path) -> None:
    """Bit by bit: ONNX Runtime convolves the images of a batch one after the other."""
    clips = [frames(60, 1, 3, 16, 24, seed=seed) for seed in range(3)]
    rates = (1, 2, 5)
    alone = [StepLoop.open(denoiser_onnx_float32) for _ in rates]
    with StepLoop.open(denoiser_onnx_float32, slots=4) as loop:
        slots = [loop.attach() for _ in rates]
        for number in range(60):
            due = [stream for stream, rate in enumerate(rates) if number % rate == 0]
            outputs = loop.step_slots({slots[stream]: {"x": clips[stream][number]} for stream in due})
            assert set(outputs) == {slots[stream] for stream in due}
            for stream in due:
                expected = alone[stream].step(x=clips[stream][number])["y"]
                np.testing.assert_array_equal(outputs[slots[stream]]["y"], expected, err_msg=f"step {number}")
        for slot, single in zip(slots, alone, strict=True):
            np.testing.assert_array_equal(loop.state()["h"][slot.index], single.state()["h"][0])


def test_three_states_of_a_stack_keep_together(stack_onnx: Path) -> None:
    xs = frames(20, 1, 3, 10, 14)
    with StepLoop.open(stack_onnx, slots=2) as loop, StepLoop.open(stack_onnx) as alone:
        other, slot = loop.attach(), loop.attach()
        (x,), (y, *_) = ([spec.name for spec in side] for side in (loop.contract.inputs, loop.contract.outputs))
        for number, frame in enumerate(xs):
            loop.step_slots({other: {x: xs[-1]}})  # the slot is idle in every second step
            found = loop.step_slots({slot: {x: frame}})[slot][y]
            np.testing.assert_array_equal(found, alone.step(**{x: frame})[y], err_msg=f"step {number}")


def test_slot_without_a_frame_keeps_its_state_bit_by_bit(denoiser_onnx_float32: Path) -> None:
    with StepLoop.open(denoiser_onnx_float32, slots=2) as loop:
        busy, quiet = loop.attach(), loop.attach()
        xs = frames(50, 1, 3, 8, 8)
        loop.step_slots({busy: {"x": xs[0]}, quiet: {"x": xs[1]}})
        kept = loop.state()["h"][quiet.index]
        for x in xs:
            loop.step_slots({busy: {"x": x}})
        assert loop.state()["h"][quiet.index].tobytes() == kept.tobytes()


def test_nan_stays_in_its_slot_and_a_reset_clears_it(denoiser_onnx_float32: Path) -> None:
    xs = frames(20, 1, 3, 16, 16)
    with StepLoop.open(denoiser_onnx_float32, slots=3) as loop, StepLoop.open(denoiser_onnx_float32) as healthy:
        well, sick, idle = (loop.attach(name) for name in ("well", "sick", "idle"))
        loop.step_slots({slot: {"x": xs[0]} for slot in (well, sick, idle)})
        healthy.step(x=xs[0])
        state = loop.state()
        state["h"][sick.index] = np.nan
        loop.load_state(state)
        kept = state["h"][idle.index]
        for x in xs:
            outputs = loop.step_slots({well: {"x": x}, sick: {"x": x}})
            assert np.isnan(outputs[sick]["y"]).any()
            np.testing.assert_array_equal(outputs[well]["y"], healthy.step(x=x)["y"])
        np.testing.assert_array_equal(loop.state()["h"][idle.index], kept)
        loop.reset([sick])
        assert not loop.state()["h"][sick.index].any()
        np.testing.assert_array_equal(loop.state()["h"][idle.index], kept)
        assert np.isfinite(loop.step_slots({sick: {"x": xs[0]}})[sick]["y"]).all()


def test_a_stream_that_comes_later_starts_afresh(loop: StepLoop) -> None:
    first = loop.attach()
    for _ in range(3):
        loop.step_slots({first: {"x": ONE}})
    loop.detach(first)
    second = loop.attach()
    assert (second.index, second.name) == (first.index, first.name)
    assert loop.step_slots({second: {"x": ONE}})[second]["y"].max() == 1
    for call in (
        lambda: loop.step_slots({first: {"x": ONE}}),
        lambda: loop.step_slots({second: {"x": ONE}, first: {"x": ONE}}),
        lambda: loop.reset([first]),
        lambda: loop.detach(first),
    ):
        with pytest.raises(StateError, match="'0' is not attached; attached: 0"):
            call()
    assert loop.step_slots({second: {"x": ONE}})[second]["y"].max() == 2


def test_names_and_a_full_table(loop: StepLoop) -> None:
    front = loop.attach("front")
    assert loop.slots == {"front": front}
    with pytest.raises(StateError, match="the name 'front' is taken by the slot in row 0"):
        loop.attach("front")
    loop.attach()
    loop.attach("rear")
    assert {name: slot.index for name, slot in loop.slots.items()} == {"front": 0, "1": 1, "rear": 2}
    with pytest.raises(StateError, match="all 3 are in use: front, 1, rear"):
        loop.attach()
    loop.detach(front)
    assert loop.attach("left").index == 0


def test_outputs_belong_to_the_caller(loop: StepLoop) -> None:
    a, b = loop.attach(), loop.attach()
    first = loop.step_slots({a: {"x": ONE}, b: {"x": 5 * ONE}})
    first[a]["y"][:] = 100
    second = loop.step_slots({a: {"x": ONE}, b: {"x": ONE}})
    assert (first[a]["y"].max(), first[b]["y"].max()) == (100, 5)
    assert (second[a]["y"].max(), second[b]["y"].max()) == (2, 6)
    assert second[a]["y"].shape == ONE.shape


def test_a_refused_frame_stops_no_other_slot_half_way(loop: StepLoop) -> None:
    a, b = loop.attach("left"), loop.attach("right")
    loop.step_slots({a: {"x": ONE}, b: {"x": ONE}})
    with pytest.raises(InputError):
        loop.step_slots({a: {"x": ONE}, b: {"x": ONE * np.nan}})
    assert loop.step_slots({a: {"x": ONE}})[a]["y"].max() == 2, "nothing is left of the refused frames"
    before = loop.state()["h"]
    for bad, message in (
        ({"x": ONE * np.nan}, "slot right: x: 12 of 12 values are NaN"),
        ({"z": ONE}, "slot right: step: expected inputs x, got z"),
        ({"x": np.ones((2, 3, 2, 2), np.float32)}, r"slot right: x: got \(2, 3, 2, 2\), slot left \(1, 3, 2, 2\)"),
        ({"x": np.ones((1, 3, 4, 4), np.float32)}, r"slot right: x: got \(1, 3, 4, 4\), slot left \(1, 3, 2, 2\)"),
    ):
        with pytest.raises(InputError, match=message):
            loop.step_slots({a: {"x": ONE}, b: bad})
    with pytest.raises(InputError, match="slot right: x: expected batch size 1 on axis 0"):
        loop.step_slots({b: {"x": np.ones((2, 3, 2, 2), np.float32)}})
    with pytest.raises(InputError, match="as in the first step"):
        loop.step_slots({b: {"x": np.ones((1, 3, 4, 4), np.float32)}})
    np.testing.assert_array_equal(loop.state()["h"], before)
    assert loop.step_slots({}) == {}


def test_reset_of_all_frees_the_sizes_and_keeps_the_slots(loop: StepLoop) -> None:
    slot = loop.attach()
    loop.step_slots({slot: {"x": ONE}})
    loop.reset()
    loop.reset([slot])  # nothing is there yet to be reset
    large = np.ones((1, 3, 4, 4), np.float32)
    assert loop.step_slots({slot: {"x": large}})[slot]["y"].max() == 1


def test_states_of_another_number_of_slots_are_refused(loop: StepLoop) -> None:
    with pytest.raises(StateError, match=r"h: expected 3 slots on axis 0, got \(2, 3, 2, 2\)"):
        loop.load_state({"h": np.zeros((2, 3, 2, 2), np.float32)})
    loop.load_state({"h": np.full((3, 3, 2, 2), 7, np.float32)})
    slot = loop.attach()
    assert loop.step_slots({slot: {"x": ONE}})[slot]["y"].max() == 1, "attached after the states were loaded"
    assert loop.state()["h"][1].max() == 7


def test_both_kinds_of_loops_refuse_the_other_calls(accumulator: Model, loop: StepLoop) -> None:
    with pytest.raises(UsageError, match="step_slots"):
        loop.step(x=ONE)
    slot = loop.attach()
    loop.step_slots({slot: {"x": ONE}})
    with pytest.raises(UsageError, match="step_slots"):
        loop.step(x=np.concatenate([ONE] * loop._table().count))
    with pytest.raises(StateError, match="True is not attached"):
        loop.reset([True, False, True])
    with StepLoop.open(accumulator()) as plain:
        assert plain.slots == {}
        for call in (plain.attach, lambda: plain.step_slots({})):
            with pytest.raises(UsageError, match="opened without slots"):
                call()


def make(write_model: Model, path: Path, **shapes: Any) -> Path:
    contract = StepContract(
        inputs=(TensorSpec(name="x", shape=shapes.get("x", ("batch", 2))),),
        outputs=(TensorSpec(name="y", shape=shapes.get("y", shapes.get("x", ("batch", 2)))),),
        states=(StateSpec(name="h", shape=shapes["h"], batch_axis=shapes.get("axis", 0)),),
    )
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["state_in.h"], ["state_out.h"])]
    return write_model(path, contract, nodes)


@pytest.mark.parametrize(
    ("slots", "shapes", "message"),
    [
        (0, {"h": ("batch", 2)}, "slots: expected a number above zero, got 0"),
        (3, {"x": (2, 2), "h": (2, 2)}, "slots: expected 2, the batch this model is fixed at, got 3"),
        (2, {"h": ("2 * batch", 2)}, "the states have different dimensions on their batch axes"),
        (2, {"x": ("batch", 2), "h": ("batch", 2), "y": (1, 2)}, "y .* has no batch axis 'batch'"),
    ],
    ids=["none", "fixed", "expression", "output"],
)
def test_models_that_cannot_have_slots(
    write_model: Model, tmp_path: Path, slots: int, shapes: dict[str, Any], message: str
) -> None:
    if "y" in shapes:
        contract = StepContract(
            inputs=(TensorSpec(name="x", shape=shapes["x"]),),
            outputs=(TensorSpec(name="y", shape=shapes["y"]),),
            states=(StateSpec(name="h", shape=shapes["h"]),),
        )
        nodes = [
            helper.make_node("ReduceSum", ["x", "axes"], ["y"]),
            helper.make_node("Identity", ["state_in.h"], ["state_out.h"]),
        ]
        axes = helper.make_tensor("axes", 7, [1], [0])
        path = write_model(tmp_path / "model.onnx", contract, nodes, initializer=[axes])
    else:
        path = make(write_model, tmp_path / "model.onnx", **shapes)
    with pytest.raises(UsageError, match=message):
        StepLoop.open(path, slots=slots)


def test_fixed_batch_and_a_batch_axis_that_is_not_the_first(write_model: Model, tmp_path: Path) -> None:
    """h' = h + x with h of (2 layers, batch, 3), the layout of torch.nn.LSTM."""
    contract = StepContract(
        inputs=(TensorSpec(name="x", shape=(4, 3)),),
        outputs=(TensorSpec(name="y", shape=(2, 4, 3)),),
        states=(StateSpec(name="h", shape=(2, 4, 3), batch_axis=1),),
    )
    nodes = [
        helper.make_node("Add", ["state_in.h", "x"], ["y"]),
        helper.make_node("Identity", ["y"], ["state_out.h"]),
    ]
    path = write_model(tmp_path / "model.onnx", contract, nodes)
    row = np.ones((1, 3), np.float32)
    with StepLoop.open(path, slots=4) as loop:
        a, b = loop.attach(), loop.attach()
        loop.step_slots({a: {"x": row}, b: {"x": row}})
        y = loop.step_slots({b: {"x": row}})[b]["y"]
        assert y.shape == (2, 1, 3)
        assert y.min() == y.max() == 2
        assert loop.state()["h"][:, a.index].max() == loop.state()["h"][:, a.index].min() == 1
        loop.reset([a])
        assert loop.state()["h"][:, a.index].max() == 0
        assert loop.state()["h"][:, b.index].min() == 2


def test_rows_are_copied_only_where_a_slot_is_idle(accumulator: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    step = OrtBackend.step

    def spy(self: OrtBackend, inputs: Any, idle: Any = ()) -> Any:
        seen.append(list(idle))
        assert (inputs["x"][list(idle)] == 1).all(), "an idle row was written to"
        return step(self, inputs, idle)

    monkeypatch.setattr(OrtBackend, "step", spy)
    loop = StepLoop(OrtBackend(accumulator(), Device("cpu")), slots=4)
    a, b, c = loop.attach(), loop.attach(), loop.attach()
    loop.step_slots({slot: {"x": ONE} for slot in (a, b, c)})
    loop.step_slots({b: {"x": ONE}})
    loop.detach(c)
    loop.step_slots({b: {"x": ONE}})
    assert seen == [[], [a.index, c.index], [a.index]]
    loop.close()


def test_a_frame_that_was_refused_is_in_nobodys_way(accumulator: Model) -> None:
    """It was packed before it was checked, and its row keeps it until the slot has another frame."""
    with StepLoop.open(accumulator(), slots=2) as loop:
        a, b = loop.attach("a"), loop.attach("b")
        with pytest.raises(InputError, match="slot b: x: 12 of 12 values are NaN"):
            loop.step_slots({a: {"x": ONE}, b: {"x": ONE * np.float32("nan")}})
        for count in (1, 2, 3):
            assert (loop.step_slots({a: {"x": ONE}})[a]["y"] == count).all()
        found = loop.step_slots({a: {"x": ONE}, b: {"x": ONE}})
        assert (found[a]["y"] == 4).all()
        assert (found[b]["y"] == 1).all()
