"""StepLoop against a hand-written loop, and the inputs it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.errors import ContractError, DeviceError, InputError, StateError, StepcellError, UsageError

Model = Callable[..., Path]
STEPS = 100


def frames(count: int, *shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((count, *shape), np.float32)


def test_equals_a_loop_written_by_hand(denoiser_onnx_float32: Path) -> None:
    session = onnxruntime.InferenceSession(denoiser_onnx_float32, providers=["CPUExecutionProvider"])
    zero = np.zeros((2, 8, 12, 16), np.float32)
    state = zero
    with StepLoop.open(denoiser_onnx_float32) as loop:
        for number, x in enumerate(frames(STEPS, 2, 3, 24, 32)):
            if number == 40:
                loop.reset()
                state = zero
            if number == 70:
                loop.reset(slots=[True, False])
                state = state * np.float32([[[[0]]], [[[1]]]])
            expected, state = session.run(["y", "state_out.h"], {"x": x, "state_in.h": state})
            np.testing.assert_array_equal(loop.step(x=x)["y"], expected, err_msg=f"step {number}")
            np.testing.assert_array_equal(loop.state()["h"], state, err_msg=f"step {number}")


def test_stack_with_three_states_equals_a_loop_written_by_hand(stack_onnx: Path) -> None:
    session = onnxruntime.InferenceSession(stack_onnx, providers=["CPUExecutionProvider"])
    with StepLoop.open(stack_onnx, keep_float16=True) as loop:
        (x_spec,), states = loop.contract.inputs, loop.contract.states
        assert [state.name for state in states] == ["h0", "h1", "c1"]
        names = [output.name for output in session.get_outputs()]
        feed = {state.input: np.zeros(shape, state.dtype) for state, shape in _shapes(loop, (1, 3, 10, 14))}
        for x in frames(STEPS, 1, 3, 10, 14).astype(x_spec.dtype):
            found = dict(zip(names, session.run(names, {x_spec.name: x, **feed}), strict=True))
            feed = {state.input: found[state.output] for state in states}
            output = loop.step(**{x_spec.name: x})
            for spec in loop.contract.outputs:
                np.testing.assert_array_equal(output[spec.name], found[spec.name])
        for state in states:
            np.testing.assert_array_equal(loop.state()[state.name], feed[state.input])


def _shapes(loop: StepLoop, shape: tuple[int, ...]) -> list[Any]:
    shapes = loop.contract.state_shapes(loop.contract.bind({loop.contract.inputs[0].name: shape}))
    return [(state, shapes[state.name]) for state in loop.contract.states]


def test_three_slots_equal_three_loops(denoiser_onnx_float32: Path) -> None:
    resets = {10: [True, False, False], 25: [False, True, True], 26: [False, False, False]}
    with StepLoop.open(denoiser_onnx_float32) as together:
        alone = [StepLoop.open(denoiser_onnx_float32) for _ in range(3)]
        for number, x in enumerate(frames(50, 3, 3, 16, 16)):
            if number in resets:
                together.reset(resets[number])
                for loop, wanted in zip(alone, resets[number], strict=True):
                    loop.reset([wanted])
            y = together.step(x=x)["y"]
            for slot, loop in enumerate(alone):
                np.testing.assert_allclose(y[slot], loop.step(x=x[slot : slot + 1])["y"][0], atol=1e-5)


def test_frames_in_any_order_of_memory(denoiser_onnx_float32: Path) -> None:
    """One array that every frame is written to, so large that ONNX Runtime binds it instead of copying it."""
    xs = frames(6, 1, 3, 64, 80)
    turned = np.asfortranarray(xs[0])
    with StepLoop.open(denoiser_onnx_float32) as loop, StepLoop.open(denoiser_onnx_float32) as other:
        for number, x in enumerate(xs):
            turned[...] = x
            frame = turned if number else x  # the first step's checks are others than those of the next ones
            np.testing.assert_array_equal(loop.step(x=frame)["y"], other.step(x=x)["y"], err_msg=f"step {number}")


def test_nan_stays_in_its_slot_and_a_reset_clears_it(denoiser_onnx_float32: Path) -> None:
    xs = frames(20, 2, 3, 16, 16)
    with StepLoop.open(denoiser_onnx_float32) as loop, StepLoop.open(denoiser_onnx_float32) as healthy:
        for x in xs[:10]:
            loop.step(x=x)
            healthy.step(x=x)
        state = loop.state()
        state["h"][1] = np.nan
        loop.load_state(state)
        for x in xs[10:]:
            y = loop.step(x=x)["y"]
            assert np.isnan(y[1]).any()
            np.testing.assert_array_equal(y[0], healthy.step(x=x)["y"][0])
        loop.reset([False, True])
        healthy.reset([False, True])
        np.testing.assert_array_equal(loop.step(x=xs[0])["y"], healthy.step(x=xs[0])["y"])


def test_snapshot_continues_the_stream(denoiser_onnx: Path) -> None:
    xs = frames(20, 1, 3, 16, 16)
    with StepLoop.open(denoiser_onnx) as loop:
        for x in xs[:10]:
            loop.step(x=x)
        snapshot = loop.state()
        expected = [loop.step(x=x)["y"] for x in xs[10:]]
        loop.load_state(snapshot)
        again = [loop.step(x=x)["y"] for x in xs[10:]]
    with StepLoop.open(denoiser_onnx) as fresh:
        fresh.load_state(snapshot)  # before the first step
        elsewhere = [fresh.step(x=x)["y"] for x in xs[10:]]
    np.testing.assert_array_equal(again, expected)
    np.testing.assert_array_equal(elsewhere, expected)


def test_snapshot_of_another_size_is_refused_by_the_first_step(accumulator: Model) -> None:
    with StepLoop.open(accumulator()) as loop:
        loop.load_state({"h": np.ones((1, 3, 4, 4), np.float32)})
        with pytest.raises(StateError, match=r"h: expected shape \(1, 3, 8, 8\).*got \(1, 3, 4, 4\)"):
            loop.step(x=np.ones((1, 3, 8, 8), np.float32))
        assert loop.step(x=np.ones((1, 3, 4, 4), np.float32))["y"].max() == 2
        loop.reset()
        assert loop.step(x=np.ones((1, 3, 8, 8), np.float32))["y"].max() == 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "expected h, got none"),
        ({"c": np.zeros((1, 3, 2, 2))}, "expected h, got c"),
        ({"h": np.zeros((3, 2, 2))}, r"h: expected float32.*got float64 \(3, 2, 2\)"),
        ({"h": np.zeros((1, 3, 2, 2), int)}, r"h: expected float32.*got int64"),
        ({"h": np.zeros((1, 3, 2, 4))}, r"h: expected shape \(1, 3, 2, 2\)"),
    ],
    ids=["empty", "name", "rank", "dtype", "shape"],
)
def test_refused_states(accumulator: Model, state: dict[str, Any], message: str) -> None:
    with StepLoop.open(accumulator()) as loop:
        loop.step(x=np.ones((1, 3, 2, 2), np.float32))
        with pytest.raises(StateError, match=message):
            loop.load_state(state)
        assert loop.state()["h"].max() == 1


class DLPackOnly:
    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x,
        lambda x: x.astype(np.float64),
        lambda x: x.astype(np.float16),
        lambda x: x.astype(">f4"),
        lambda x: np.asfortranarray(x),
        lambda x: x.tolist(),
        torch.from_numpy,
        DLPackOnly,
    ],
    ids=["float32", "float64", "float16", "big-endian", "fortran", "list", "torch", "dlpack"],
)
def test_kinds_of_arrays(accumulator: Model, convert: Callable[[NDArray[Any]], Any]) -> None:
    x = np.arange(24, dtype=np.float32).reshape(1, 3, 2, 4)
    with StepLoop.open(accumulator()) as loop:
        loop.step(x=convert(x))
        np.testing.assert_array_equal(loop.step(x=convert(x))["y"], 2 * x)


ONES = np.ones((1, 3, 2, 4), np.float32)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "expected inputs x, got none"),
        ({"z": ONES}, "expected inputs x, got z"),
        ({"x": ONES, "z": ONES}, "expected inputs x, got x, z"),
        ({"x": ONES[0]}, r"x: expected shape .* got \(3, 2, 4\)"),
        ({"x": ONES[:, :2]}, r"x: expected shape .* got \(1, 2, 2, 4\)"),
        ({"x": (ONES * 255).astype(np.uint8)}, r"x: expected float32, got uint8\nHint: scale pixels .* / 255$"),
        ({"x": ONES.astype(np.int64)}, "x: expected float32, got int64"),
        ({"x": ONES > 0}, "x: expected float32, got bool"),
        ({"x": ONES * np.nan}, "x: 24 of 24 values are NaN or Inf"),
        ({"x": ONES * np.inf}, "x: 24 of 24 values are NaN or Inf"),
        ({"x": ONES.astype(np.float64) * 1e300}, "x: 24 of 24 values are NaN or Inf as float32"),
        ({"x": [[1.0], [1.0, 2.0]]}, "x: expected an array that numpy can read, got list"),
        ({"x": "frame"}, "x: expected float32, got <U5"),
        ({"x": torch.ones(1, 3, 2, 4, requires_grad=True)}, "x: expected an array that numpy can read, got Tensor"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_refused_inputs_leave_the_state_alone(accumulator: Model, inputs: dict[str, Any], message: str) -> None:
    with StepLoop.open(accumulator(range=(0.0, 1.0))) as loop:
        loop.step(x=ONES)
        with pytest.raises(InputError, match=message):
            loop.step(**inputs)
        assert loop.step(x=ONES)["y"].max() == 2


def test_integer_input_takes_what_is_cast_without_loss(accumulator: Model) -> None:
    with StepLoop.open(accumulator(dtype="int32")) as loop:
        assert loop.step(x=np.ones((1, 3, 2, 2), np.uint8))["y"].dtype == np.int32
        with pytest.raises(InputError, match="x: expected int32, got int64"):
            loop.step(x=np.ones((1, 3, 2, 2), np.int64))


def test_finite_check_can_be_turned_off(accumulator: Model) -> None:
    with StepLoop.open(accumulator(), check_finite=False) as loop:
        assert np.isnan(loop.step(x=ONES * np.nan)["y"]).all()


def test_first_step_fixes_the_sizes_and_reset_frees_them(accumulator: Model) -> None:
    with StepLoop.open(accumulator()) as loop:
        loop.step(x=ONES)
        with pytest.raises(InputError, match=r"x: expected shape \(1, 3, 2, 4\) as in the first step") as caught:
            loop.step(x=np.ones((1, 3, 4, 4), np.float32))
        assert caught.value.hint is not None
        assert "reset()" in caught.value.hint
        loop.reset()
        assert loop.step(x=np.ones((2, 3, 4, 4), np.float32))["y"].shape == (2, 3, 4, 4)
        loop.reset()
        assert loop.step(x=np.ones((2, 3, 4, 4), np.float32))["y"].max() == 1


def test_fixed_model_says_what_it_takes(denoiser_onnx_fixed: Path) -> None:
    with (
        StepLoop.open(denoiser_onnx_fixed) as loop,
        pytest.raises(InputError, match=r"x: expected shape \(1, 3, 64, 96\)"),
    ):
        loop.step(x=np.ones((1, 3, 64, 64), np.float32))


def test_outputs_belong_to_the_caller(accumulator: Model) -> None:
    with StepLoop.open(accumulator()) as loop:
        outputs = [loop.step(x=ONES)["y"] for _ in range(5)]
        outputs[-1][:] = 100
        state = loop.state()["h"]
        state[:] = 100
        assert loop.step(x=ONES)["y"].max() == 6
    assert [y.max() for y in outputs] == [1, 2, 3, 4, 100]


@pytest.mark.parametrize("slots", [[True], [True, False, True], [1, 0], [[True, False]], "no", 3], ids=str)
def test_refused_slots(accumulator: Model, slots: Any) -> None:
    with StepLoop.open(accumulator()) as loop:
        loop.step(x=np.ones((2, 3, 2, 2), np.float32))
        with pytest.raises(InputError, match="slots: expected 2 booleans"):
            loop.reset(slots)


def test_before_the_first_step_states_have_no_size(accumulator: Model) -> None:
    with StepLoop.open(accumulator()) as loop:
        for call in (loop.state, lambda: loop.reset([True])):
            with pytest.raises(StateError, match="no step has run yet"):
                call()


def test_closed_loop_refuses_everything(accumulator: Model) -> None:
    with StepLoop.open(accumulator()) as loop:
        loop.step(x=ONES)
    loop.close()
    for call in (lambda: loop.step(x=ONES), loop.reset, loop.state, lambda: loop.load_state({}), loop.__enter__):
        with pytest.raises(StepcellError, match="closed"):
            call()


def test_the_first_step_is_in_no_other_figure(accumulator: Model) -> None:
    with StepLoop.open(accumulator()) as loop:
        for _ in range(11):
            loop.step(x=ONES)
        with pytest.raises(InputError):
            loop.step(x=ONES * np.nan)
        summary = loop.latency.summary()
    assert summary.count == 10
    assert summary.first_ms is not None
    assert summary.p99_ms is not None


@pytest.mark.parametrize(
    ("name", "device", "error", "message"),
    [
        ("model.onnx", "gpu", UsageError, "expected cpu, cuda or cuda:N, got 'gpu'"),
        ("model.onnx", "cuda:x", UsageError, "expected cpu, cuda or cuda:N"),
        ("model.bin", "cpu", UsageError, "got suffix '.bin'"),
        ("model.engine", "cpu", DeviceError, "runs on a GPU only"),
        ("model.onnx", "cpu", InputError, "model.onnx: cannot be read"),
    ],
)
def test_what_cannot_be_opened(
    tmp_path: Path, name: str, device: str, error: type[StepcellError], message: str
) -> None:
    with pytest.raises(error, match=message):
        StepLoop.open(tmp_path / name, device)


def test_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("not a model")
    with pytest.raises(InputError, match=r"model\.onnx: is not an ONNX model"):
        StepLoop.open(path)


def test_model_without_a_contract(accumulator: Model) -> None:
    path = accumulator()
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(ContractError, match="has no state contract") as caught:
        StepLoop.open(path)
    assert caught.value.hint is not None


def test_contract_of_another_graph(accumulator: Model) -> None:
    path = accumulator()
    model = onnx.load(path)
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"dtype": "float32"', '"dtype": "float64"', 1)
    onnx.save(model, path)
    with pytest.raises(ContractError, match=r"inputs differ from its contract: expected .*x float64.* got .*x float32"):
        StepLoop.open(path)
