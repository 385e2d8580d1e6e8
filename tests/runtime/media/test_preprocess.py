"""Preprocessing and output postprocessing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import InputError, StepcellError, UsageError
from stepcell.pixels import as_chw
from stepcell.runtime.media.postprocess import crop, is_picture, to_pixels
from stepcell.runtime.media.preprocess import Preprocessor, image_input


def picture(count: int = 3, **fields: Any) -> TensorSpec:
    fields = {"layout": "NCHW", "range": (0.0, 255.0), **fields}
    sizes = {"N": "batch", "C": count, "H": "height", "W": "width"}
    fields.setdefault("shape", tuple(sizes[letter] for letter in fields["layout"]))
    return TensorSpec(name="x", **fields)


def random_frame(height: int, width: int, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def test_scaling_equals_torch() -> None:
    frame = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    tensor = Preprocessor(picture(range=(0.0, 1.0)), frame)(frame)
    expected = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
    np.testing.assert_array_equal(tensor, expected.numpy())


@pytest.mark.parametrize(
    "limits", [(0.0, 1.0), (0.0, 255.0), (0.0, 2.0), (0.0, 0.7), (-1.0, 1.0), (-5e-7, 4.1)], ids=str
)
def test_every_pixel_value_is_rounded_once(limits: tuple[float, float]) -> None:
    frame = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    low, high = limits
    expected = (low + np.arange(256) * ((high - low) / 255)).astype(np.float32)
    np.testing.assert_array_equal(Preprocessor(picture(1, range=limits), frame)(frame).ravel(), expected)


SCALES: list[dict[str, Any]] = [
    {"range": (0.0, 1.0)},
    {"range": (-1.0, 1.0)},
    {"range": (0.0, 255.0)},
    {"range": (0.0, 1.0), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    {"range": (0.0, 1.0), "dtype": "float16"},
    {"range": None, "dtype": "uint8"},
    {"range": (-128.0, 127.0), "dtype": "int8"},
    {"range": (0.0, 65535.0), "dtype": "uint16"},
]


@pytest.mark.parametrize("fields", SCALES, ids=str)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), channels=st.sampled_from([1, 3]), multiple=st.integers(1, 16)
)
def test_pad_and_crop_round_trip(fields: dict[str, Any], height: int, width: int, channels: int, multiple: int) -> None:
    if channels == 1:
        fields = {key: value[:1] if key in ("mean", "std") else value for key, value in fields.items()}
    spec = picture(channels, pad_multiple=multiple, **fields)
    frame = random_frame(height, width, channels)
    preprocessor = Preprocessor(spec, frame)
    tensor = preprocessor(frame)
    assert tensor.shape[2] % multiple == tensor.shape[3] % multiple == 0
    assert tensor.shape[2] - height < multiple
    assert tensor.dtype == np.dtype(spec.dtype)
    assert tensor.flags.c_contiguous
    cropped = crop(tensor, preprocessor.size, preprocessor.padded, "NCHW")
    np.testing.assert_array_equal(to_pixels(spec, cropped[0]), frame)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "CHW", "HWC"])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_layout_and_order_of_the_channels_are_those_of_the_model(layout: str, order: str) -> None:
    frame = random_frame(5, 7)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    spec = picture(layout=layout, channels=order, range=(0.0, 1.0), mean=mean, std=std, pad_multiple=4)
    preprocessor = Preprocessor(spec, frame)
    tensor = preprocessor(frame)
    ordered = frame if order == "RGB" else frame[..., ::-1]
    expected = (np.pad(ordered, ((0, 3), (0, 1), (0, 0)), mode="edge") / 255 - mean) / std  # in the model's order
    places = {"N": None, "H": 0, "W": 1, "C": 2}
    expected = expected.transpose([places[letter] for letter in layout if letter != "N"])
    np.testing.assert_allclose(tensor, expected[None] if layout[0] == "N" else expected, rtol=0, atol=1e-6)
    cropped = crop(tensor, preprocessor.size, preprocessor.padded, layout)
    np.testing.assert_array_equal(to_pixels(spec, as_chw(cropped, layout)), frame)


def test_imagenet_statistics_equal_torchvision_s_order_of_operations() -> None:
    frame = random_frame(4, 4)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tensor = Preprocessor(picture(range=(0.0, 1.0), mean=mean, std=std), frame)(frame)
    scaled = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
    expected = (scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    np.testing.assert_allclose(tensor[0], expected.numpy(), rtol=0, atol=1e-6)


def test_undefined_range_takes_no_pixels_and_gives_none() -> None:
    with pytest.raises(UsageError, match="the range of its pixel values is undefined") as caught:
        Preprocessor(picture(range=None), random_frame(4, 4))
    assert "--range x:0,1" in str(caught.value.hint)
    with pytest.raises(UsageError, match="undefined"):
        to_pixels(picture(range=None), np.zeros((3, 2, 2), np.float32))
    scaled = np.zeros((3, 4, 4), np.float32)  # the values that the model takes already
    assert Preprocessor(picture(range=None), scaled)(scaled).shape == (1, 3, 4, 4)


def test_masks_labels_and_bytes_are_pixels() -> None:
    mask = picture(1, dtype="bool", range=None)
    assert to_pixels(mask, np.array([[[False, True]]])).ravel().tolist() == [0, 255]
    labels = picture(layout="NHW", dtype="int64", range=None)
    assert is_picture(labels)
    assert to_pixels(labels, np.array([[[0, 3, 255]]])).ravel().tolist() == [0, 3, 255]
    spread = picture(layout="NHW", dtype="int64", range=(0.0, 5.0))
    assert to_pixels(spread, np.array([[[0, 3, 5]]])).ravel().tolist() == [0, 153, 255]
    with pytest.raises(StepcellError, match="the label 256 is no grey level"):
        to_pixels(labels, np.array([[[0, 256]]]))
    with pytest.raises(StepcellError, match="the label -1 is no grey level"):
        to_pixels(labels, np.array([[[0, -1]]]))
    frame = random_frame(2, 2)
    data = picture(layout="NHWC", dtype="uint8", range=None)
    np.testing.assert_array_equal(to_pixels(data, as_chw(frame[None], "NHWC")), frame)
    given = np.array([[[0], [127], [128], [255]]], np.uint8)
    assert Preprocessor(mask, given)(given).ravel().tolist() == [False, False, True, True]


def test_four_channels_come_as_four() -> None:
    frame = random_frame(4, 6, 4)
    tensor = Preprocessor(picture(4, range=(0.0, 1.0)), frame)(frame)
    np.testing.assert_allclose(tensor[0], frame.transpose(2, 0, 1) / 255, rtol=0, atol=1e-7)
    with pytest.raises(InputError, match="takes 4 channels, the frames are colour") as caught:
        Preprocessor(picture(4), random_frame(4, 6))
    assert "(T, H, W, 4)" in str(caught.value.hint)


def test_padding_repeats_the_edge() -> None:
    frame = random_frame(5, 6)
    tensor = Preprocessor(picture(pad_multiple=8), frame)(frame)
    expected = np.pad(frame, ((0, 3), (0, 2), (0, 0)), mode="edge").transpose(2, 0, 1)[None]
    np.testing.assert_array_equal(tensor, expected)


@pytest.mark.parametrize("factor", [0.5, 1, 2, 4])
def test_crop_follows_a_model_that_changes_the_size(factor: float) -> None:
    frame = random_frame(13, 21)
    preprocessor = Preprocessor(picture(pad_multiple=8), frame)
    assert preprocessor.padded == (16, 24)
    output = np.zeros((1, 3, int(16 * factor), int(24 * factor)))
    assert crop(output, preprocessor.size, preprocessor.padded, "NCHW").shape == (
        1,
        3,
        int(np.ceil(13 * factor)),
        int(np.ceil(21 * factor)),
    )


def test_float_frames_are_taken_as_scaled() -> None:
    frame = np.random.default_rng(0).random((3, 5, 6), np.float32)
    tensor = Preprocessor(picture(range=(-1.0, 1.0), pad_multiple=2), frame)(frame)
    assert tensor.shape == (1, 3, 6, 6)
    np.testing.assert_array_equal(tensor[0, :, :5], frame)


def test_floats_of_another_range_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    spec = TensorSpec(
        name="x",
        shape=("n", 3, "h", "w"),
        dtype="float32",
        layout="NCHW",
        range=(0.0, 1.0),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    for frame, warned in ((np.full((3, 2, 2), 255.0), True), (np.full((3, 2, 2), -1.5), False)):
        caplog.clear()
        Preprocessor(spec, frame.astype(np.float32))
        assert ("those of pixels in -1 to 1; arrays of floats are taken as they are" in caplog.text) is warned


def test_pixels_are_clipped_and_rounded() -> None:
    values = np.float32([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.5]).reshape(1, 1, 6)
    assert to_pixels(picture(1, range=(0.0, 1.0)), values).ravel().tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_an_error(bad: float) -> None:
    with pytest.raises(StepcellError, match="returned NaN or Inf"):
        to_pixels(picture(range=(0.0, 1.0)), np.full((3, 2, 2), bad, np.float32))


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (picture(3), (4, 4, 1), r"takes colour \(3 channels\), the frames are greyscale \(1 channel\)"),
        (picture(1), (4, 4, 3), r"takes greyscale \(1 channel\), the frames are colour"),
        (picture(shape=(1, 3, 64, 96)), (64, 64, 3), "exported for 96x64 frames, got 64x64"),
        (picture(shape=("batch", 3, "height", 96)), (64, 64, 3), "exported for 96xheight frames, got 64x64"),
    ],
)
def test_frames_that_do_not_fit(spec: TensorSpec, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Preprocessor(spec, np.zeros(shape, np.uint8))
    assert caught.value.hint is not None


def test_fixed_size_that_padding_reaches_is_taken() -> None:
    frame = random_frame(61, 93)
    spec = picture(shape=(1, 3, 64, 96), pad_multiple=4)
    assert Preprocessor(spec, frame)(frame).shape == (1, 3, 64, 96)


def test_later_frame_of_another_size() -> None:
    preprocessor = Preprocessor(picture(), random_frame(4, 4))
    with pytest.raises(InputError, match="this one"):
        preprocessor(random_frame(4, 5))


def contract(*inputs: TensorSpec) -> StepContract:
    return StepContract(inputs=inputs, outputs=(), states=())


def test_one_picture_input_is_found() -> None:
    assert image_input(contract(picture())) == picture()
    assert is_picture(picture(1))


def test_a_fixed_batch_takes_as_many_streams() -> None:
    four = picture(shape=(4, 3, "height", "width"))
    assert image_input(contract(four), 4) == four
    with pytest.raises(InputError, match="the batch is fixed at 4, got 3 streams"):
        image_input(contract(four), 3)


@pytest.mark.parametrize(
    "inputs",
    [
        (),
        (picture(), TensorSpec(name="flow", shape=("batch", 2, "height", "width"), layout="NCHW")),
        (TensorSpec(name="x", shape=("batch", 64)),),
        (TensorSpec(name="x", shape=("batch", 5, "height", "width"), layout="NCHW"),),
        (picture(shape=(4, 3, "height", "width")),),
    ],
    ids=["none", "two", "vector", "five channels", "fixed batch"],
)
def test_other_inputs_point_to_python(inputs: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(InputError) as caught:
        image_input(contract(*inputs))
    assert "StepLoop" in (caught.value.hint or "")


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_pictures_of_many_rows_are_converted_as_each_pixel_is(layout: str) -> None:
    """Rows are converted in blocks; the last one is shorter."""
    channels = {"channels": "BGR"} if layout == "NHWC" else {}
    shape = ("batch", 3, "height", "width") if layout == "NCHW" else ("batch", "height", "width", 3)
    spec = TensorSpec(
        name="x", dtype="float32", shape=shape, layout=layout, range=(0.0, 1.0), mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4), pad_multiple=8, **channels,
    )  # type: ignore[arg-type]  # fmt: skip
    frame = random_frame(75, 6)
    preprocessor = Preprocessor(spec, frame)
    tensor = preprocessor(frame)
    planes = as_chw(tensor, layout)
    for number in range(3):
        pixel = frame[..., 2 - number if channels else number]
        wanted = (pixel / 255 - (0.4, 0.5, 0.6)[number]) / (0.2, 0.3, 0.4)[number]
        np.testing.assert_allclose(planes[number, :75, :6], wanted, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(planes[number, 75:, :6], np.repeat(planes[number, 74:75, :6], 5, axis=0))
    assert preprocessor(frame, tensor) is tensor
    cropped = crop(tensor, preprocessor.size, preprocessor.padded, layout)
    np.testing.assert_array_equal(to_pixels(spec, as_chw(cropped, layout)), frame)
