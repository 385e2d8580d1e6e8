"""Clips to verify with: files as `stepcell run` reads them, random values in the declared range, rows of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import InputError
from stepcell.runtime.verify.behaviour import isolation
from stepcell.runtime.verify.clips import random_clip, sizes_for, source_clip
from stepcell.runtime.verify.growth import error_growth
from stepcell.runtime.verify.stepper import FunctionStepper

IMAGE = ("batch", 3, "height", "width")


def contract(**spec: Any) -> StepContract:
    return StepContract(
        inputs=(TensorSpec(name="x", shape=IMAGE, layout="NCHW", **spec),),
        outputs=(TensorSpec(name="y", shape=IMAGE),),
        states=(StateSpec(name="h", shape=("batch", 8, "height // 4", "width // 4")),),
        example={"batch": 1, "height": 256, "width": 256},
    )


def test_random_frames_lie_in_the_range_and_are_normalised() -> None:
    spec = contract(range=(0.0, 1.0), mean=(0.5, 0.5, 0.0), std=(0.25, 0.5, 1.0), pad_multiple=4)
    sizes = sizes_for(spec)
    assert sizes == {"batch": 1, "height": 64, "width": 64}
    clip = random_clip(spec, sizes, count=3)
    x = np.stack([clip[t]["x"] for t in range(3)])
    for channel, (low, high) in enumerate([(-2, 2), (-1, 1), (0, 1)]):
        values = x[:, :, channel]
        assert low <= values.min() < low + 0.05
        assert high - 0.05 < values.max() <= high
    again = random_clip(spec, sizes, count=3)
    assert np.array_equal(clip[1]["x"], again[1]["x"])
    assert not np.array_equal(clip[1]["x"], random_clip(spec, sizes, count=3, seed=1)[1]["x"])


def test_sizes_are_those_asked_for_and_must_fit() -> None:
    spec = contract(pad_multiple=4)
    assert sizes_for(spec, {"x": (2, 3, 8, 12)}) == {"batch": 2, "height": 8, "width": 12}
    with pytest.raises(InputError, match="multiples of 4"):
        sizes_for(spec, {"x": (1, 3, 9, 12)})
    with pytest.raises(InputError, match="expected shape"):
        sizes_for(spec, {"x": (1, 4, 8, 12)})


def test_rows_of_a_batch_are_different_and_row_0_is_the_clip() -> None:
    clip = random_clip(contract(), {"batch": 1, "height": 8, "width": 8}, count=4)
    rows = clip.rows(contract(), 3)
    for t in range(4):
        assert rows[t]["x"].shape == (3, 3, 8, 8)
        for row in range(3):
            assert np.array_equal(rows[t]["x"][row], clip[t + row]["x"][0])


def test_a_file_of_pixels_is_scaled_and_padded_as_run_does(tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", np.full((5, 6, 8, 3), 255, np.uint8))
    clip = source_clip(contract(range=(0.0, 1.0), pad_multiple=4), str(tmp_path / "clip.npy"), limit=4)
    assert len(clip) == 4
    assert clip.shapes == {"x": (1, 3, 8, 8)}
    assert (clip[0]["x"] == 1).all()


def test_sizes_that_are_no_pictures_are_those_of_the_example() -> None:
    """A chunk of sound: a model need not run with another length. A rate without axes is one number for all rows."""
    spec = StepContract(
        inputs=(
            TensorSpec(name="sound", shape=("batch", "samples")),
            TensorSpec(name="rate", shape=(), dtype="int64", batch_axis=None),
        ),
        outputs=(TensorSpec(name="y", shape=("batch", 1)),),
        states=(StateSpec(name="h", shape=(2, "batch", 8), batch_axis=1),),
        example={"batch": 1, "samples": 512},
    )
    sizes = sizes_for(spec)
    assert sizes == {"batch": 1, "samples": 512}
    three = random_clip(spec, sizes, count=4).rows(spec, 3)
    assert three.shapes == {"sound": (3, 512), "rate": ()}

    def step(inputs: Any, states: Any) -> Any:
        h = 0.5 * states["h"] + inputs["rate"] + inputs["sound"][None, :, :8]
        return {"y": h[0, :, :1]}, {"h": h}

    assert isolation(FunctionStepper(step, spec, "test"), three).passed


def test_frames_with_nan_are_refused(tmp_path: Path) -> None:
    """A NaN in both runs is no difference: every verdict passed, over NaN."""
    frames = np.zeros((4, 3, 8, 8), np.float32)
    frames[2, 1, 3, 3] = np.nan
    np.save(tmp_path / "clip.npy", frames)
    with pytest.raises(InputError, match="frame 2: x: 1 of 192 values are NaN or Inf as float32"):
        source_clip(contract(range=(0.0, 1.0)), str(tmp_path / "clip.npy"))


def test_a_reference_that_returns_nan_is_refused() -> None:
    spec = contract()
    clip = random_clip(spec, {"batch": 1, "height": 32, "width": 32})

    def step(inputs: Any, states: Any) -> Any:
        h = states["h"] + 1
        return {"y": np.where(h.sum() > 1600, np.nan, inputs["x"])}, {"h": h}  # 512 more in each step

    stepper = FunctionStepper(step, spec, "test")
    error_growth(stepper, stepper, clip, 3)
    with pytest.raises(InputError, match="step 4: the reference returns NaN in output y"):
        error_growth(stepper, stepper, clip, 8)
