"""Declaring what the pixels of a model are: to which tensors an option applies, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepcell.cli.pixel_options import pop_pixels
from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import ContractError, UsageError
from stepcell.event_spec import EventSpec, EventWindow
from stepcell.pixels import ALL, Pixels, changes, declare, map_layout, natural_layout, value_range
from stepcell.sample_frames import random_frame, smooth_frame

RGB = ("batch", 3, "height", "width")
GREY = ("batch", 1, "height", "width")


def spec(name: str = "x", shape: tuple[int | str, ...] = RGB, layout: str | None = "NCHW", **fields: Any) -> TensorSpec:
    return TensorSpec(name=name, shape=shape, layout=layout, **fields)


def contract(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = ()) -> StepContract:
    return StepContract(inputs=inputs or (spec(),), outputs=outputs, states=(StateSpec(name="h", shape=("batch", 4)),))


MATTE = contract(spec("src"), outputs=(spec("fgr"), spec("pha", GREY), spec("flow", ("batch", 2, "height", "width"))))


def test_an_option_without_a_name_holds_for_every_picture() -> None:
    found = declare(MATTE, Pixels(range=(0, 1), mean=(0.5,), std=(0.25, 0.5, 1), channels="BGR"))
    src, (fgr, pha, flow) = found.inputs[0], found.outputs
    assert (src.range, src.mean, src.std, src.channels) == ((0, 1), (0.5,), (0.25, 0.5, 1), "BGR")
    assert (fgr.range, fgr.mean, fgr.channels) == ((0, 1), None, "BGR")
    assert (pha.range, pha.channels) == ((0, 1), None)
    assert flow == MATTE.outputs[2]
    found.check()
    assert declare(MATTE, Pixels(range=(0, 1))).inputs[0].channels == "RGB"  # written out for other readers


def test_a_name_is_for_one_tensor_and_comes_first() -> None:
    found = declare(MATTE, {ALL: Pixels(range=(0, 255)), "pha": Pixels(range=(0, 1)), "flow": Pixels(range=(-40, 40))})
    assert found.inputs[0].range == (0, 255)
    assert [each.range for each in found.outputs] == [(0, 255), (0, 1), (-40, 40)]
    assert changes(MATTE, found)[2:] == ["pha: range undefined -> 0 to 1", "flow: range undefined -> -40 to 40"]


def test_bytes_masks_labels_and_events_are_no_pictures_to_scale() -> None:
    events = EventSpec(representation="voxel_grid", bins=3, window=EventWindow(size=30, unit="us"))
    other = contract(
        spec("a"),
        spec("data", ("batch", "height", "width", 3), "NHWC", dtype="uint8"),
        spec("ev", ("batch", events.channels, "height", "width"), events=events),
        outputs=(spec("mask", GREY, dtype="bool"), spec("label", ("batch", "height", "width"), "NHW", dtype="int64")),
    )
    found = declare(other, Pixels(range=(0, 1)))
    assert [each.range for each in (*found.inputs, *found.outputs)] == [(0, 1), None, None, None, None]
    assert [value_range(each) for each in (other.inputs[1], other.outputs[0])] == [(0, 255), (0, 1)]
    with pytest.raises(UsageError, match="ev: is made of events"):
        declare(other, {"ev": Pixels(range=(0, 1))})


def test_layout_makes_a_picture_of_a_tensor() -> None:
    symbolic = contract(spec("x", ("batch", "a", "b", 3), "NCHW"), outputs=(spec("y", ("batch", "a", "b"), None),))
    found = declare(symbolic, Pixels(layout="NHWC", range=(0, 1)))
    assert (found.inputs[0].layout, found.inputs[0].range, found.outputs[0].layout) == ("NHWC", (0, 1), None)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (Pixels(range=(1, 0)), "expected low,high with low < high, got 1,0"),
        (Pixels(range=(0, 0)), "low < high"),
        (Pixels(range=(0, float("inf"))), "low < high"),
        (Pixels(range=(float("nan"), 1)), "low < high"),
        (Pixels(range=(0, 1), mean=(0.5, 0.5)), "mean: expected 3 numbers, one per channel, or one for all, got 2"),
        (Pixels(range=(0, 1), std=(1, 1, 1, 1)), "std: expected 3 numbers"),
        (Pixels(range=(0, 1), std=(1, 0, 1)), "std: expected numbers above zero, got 1,0,1"),
        (Pixels(range=(0, 1), mean=(float("nan"),)), "mean: expected finite numbers"),
        (Pixels(range=(0, 1), mean=(123.7, 116.3, 103.5)), "mean 123.7,116.3,103.5 lies outside the range 0 to 1"),
        (Pixels(mean=(0.5,)), "mean: is in units of the range, which is undefined"),
        (Pixels(layout="NCHH"), "layout: expected a letter for each axis"),
        (Pixels(layout="N2WC"), "layout: expected a letter"),
        (Pixels(layout="CHW"), "--layout: no input or output has as many axes"),
        ({"z": Pixels(range=(0, 1))}, "z: the model has no input or output of this name"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_a_usage_error(pixels: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        declare(contract(), pixels)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize(
    ("model", "pixels", "message"),
    [
        (contract(spec(shape=GREY)), Pixels(channels="BGR"), "--channels: is an order of three channels, and x is"),
        (contract(spec(shape=("batch", 64), layout=None)), Pixels(range=(0, 1)), "--range: nothing is a picture"),
        (contract(spec(dtype="uint8")), Pixels(range=(0, 1)), "x takes uint8, which are pixels as they are"),
        (contract(spec(dtype="uint8")), {"x": Pixels(range=(0, 256))}, "uint8 holds 0 to 255"),
        (contract(spec(dtype="float16")), Pixels(range=(0, 70000)), "float16 holds -65504 to 65504"),
        (contract(spec(dtype="uint8")), {"x": Pixels(mean=(0.5,))}, "mean: is for floats"),
        (contract(spec(shape=("batch", 4, "h", "w"))), {"x": Pixels(channels="RGB")}, "an order of three channels"),
    ],
)
def test_what_applies_to_nothing_is_a_usage_error(model: StepContract, pixels: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        declare(model, pixels)


def test_a_contract_with_pixels_that_do_not_fit_is_refused() -> None:
    text = contract(spec(range=(0, 1), mean=(0.5, 0.5))).to_json()
    with pytest.raises(ContractError, match="x: mean: expected 3 numbers"):
        StepContract.from_json(text)
    old = contract(spec(range=(0, 1))).to_json().replace('"channels": null,', "")
    assert StepContract.from_json(old).inputs[0].channels is None


def test_options_are_read_as_they_are_typed() -> None:
    empty: dict[str, Any] = dict.fromkeys(("pixel_range", "mean", "std", "channels", "layout"), ())
    given = {**empty, "pixel_range": ("0,1", "a:0:0,255"), "mean": ("0.5,.25,1e-3",), "channels": ("bgr",)}
    everyone = Pixels(range=(0, 1), mean=(0.5, 0.25, 0.001), channels="BGR")
    assert pop_pixels(given) == {ALL: everyone, "a:0": Pixels(range=(0, 255))}
    wrong = {"pixel_range": ("0", "0,1,2", "x:"), "mean": ("a,b",), "channels": ("RBG",), "layout": ("4",)}
    for option, text in ((option, text) for option, texts in wrong.items() for text in texts):
        with pytest.raises(UsageError, match=f"--{option.removeprefix('pixel_')}: expected"):
            pop_pixels({**empty, option: (text,)})
    with pytest.raises(UsageError, match="--range 0,2: given twice for every picture"):
        pop_pixels({**empty, "pixel_range": ("0,1", "0,2")})


def test_layouts_follow_from_sizes_only_where_they_show_it() -> None:
    assert natural_layout(("batch", 3, "height", "width")) == "NCHW"
    assert natural_layout(("batch", "height", "width", 3)) == "NHWC"
    assert natural_layout((1, 3, 64, 3)) == "NCHW"
    assert natural_layout((1, 64, 64, 16)) == "NCHW"
    assert natural_layout((1, 64)) is None
    assert map_layout(("batch", "height", "width"), [spec()]) == "NHW"
    assert map_layout(("batch", "height // 2", "width // 2"), [spec()]) == "NHW"
    assert map_layout((1, 32, 48), [spec(shape=(1, 3, 64, 96))]) == "NHW"
    assert map_layout((1, 100, 4), [spec(shape=(1, 3, 64, 96))]) is None
    assert map_layout(("batch", 100, 4), [spec()]) is None


@pytest.mark.parametrize(
    ("fields", "low", "high"),
    [
        ({}, -1, 1),
        ({"range": (0.0, 1.0)}, 0, 1),
        ({"range": (0.0, 255.0)}, 0, 255),
        ({"range": (0.0, 1.0), "mean": (0.5,), "std": (0.25,)}, -2, 2),
        ({"dtype": "uint8"}, 0, 255),
        ({"dtype": "int8"}, -128, 127),
        ({"dtype": "int8", "range": (0.0, 100.0)}, 0, 100),
        ({"dtype": "int32"}, 0, 255),
        ({"dtype": "int32", "shape": ("batch", "tokens"), "layout": None}, 0, 1),
        ({"dtype": "int64", "shape": GREY}, 0, 1),
        ({"dtype": "int64", "shape": GREY, "range": (0.0, 20.0)}, 0, 20),
        ({"dtype": "bool"}, 0, 1),
    ],
    ids=str,
)  # fmt: skip
def test_frames_of_the_check_have_every_level_of_the_range(fields: dict[str, Any], low: float, high: float) -> None:
    tensor = spec(**fields)
    rng = np.random.default_rng(0)
    frames = np.stack([random_frame(tensor, (1, 3, 32, 48), rng) for _ in range(4)])
    assert frames.dtype == np.dtype(tensor.dtype)
    if tensor.dtype.startswith("float"):
        assert low <= frames.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < frames.max() <= high
    else:
        assert len(np.unique(frames)) == high - low + 1
    smooth = np.stack([smooth_frame(tensor, (1, 3, 32, 48), t) for t in range(4)])
    assert low <= smooth.min() < smooth.max() <= high
    assert smooth.dtype == np.dtype(tensor.dtype)
