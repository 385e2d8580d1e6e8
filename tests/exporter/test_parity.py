"""The equality check on models of a few lines."""

from __future__ import annotations

import numpy as np
import pytest

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import ExportError, ParityError
from stepcell.exporter.parity import (
    TOLERANCE,
    Arrays,
    CheckClip,
    Step,
    check_equal,
    fed_back,
    random_clip,
    smooth_clip,
)

CONTRACT = StepContract(
    inputs=(TensorSpec(name="x", shape=(1, 3)),),
    outputs=(TensorSpec(name="y", shape=(1, 3)),),
    states=(StateSpec(name="h", shape=(1, 3)),),
)
SHAPES = {"x": (1, 3), "h": (1, 3)}


def model(decay: float = 0.9, offset: float = 0.0, dtype: str = "float32") -> Step:
    """An exponential mean."""

    def step(data: Arrays, states: Arrays) -> Arrays:
        h = (states["h"] * decay + data["x"] * (1 - decay) + offset).astype(dtype)
        return {"y": h * 2, "h": h}

    return step


def clips() -> list[CheckClip]:
    return [make(CONTRACT, "sizes {}", SHAPES, 20) for make in (random_clip, smooth_clip)]


def check(reference: Step, other: Step) -> None:
    check_equal(fed_back(reference), other, clips(), TOLERANCE["float32"], subject="the reference")


def test_rounding_is_accepted() -> None:
    check(model(), model(dtype="float64"))


def test_another_result_of_a_step_is_found() -> None:
    with pytest.raises(ParityError, match=r"differs from the reference by .* \(random frames, sizes {}\)"):
        check(model(), model(offset=3e-4))


def test_what_the_model_amplifies_from_step_to_step_is_accepted() -> None:
    def unstable(dtype: str) -> Step:
        def step(data: Arrays, states: Arrays) -> Arrays:
            h = np.sin(40 * (states["h"] + data["x"])).astype(dtype)
            return {"y": h, "h": h}

        return step

    check(unstable("float32"), unstable("float64"))


def test_a_reference_of_nan_proves_nothing() -> None:
    with pytest.raises(ExportError, match="the reference returns NaN at step 0"):
        check(model(decay=float("nan")), model())


def test_another_shape_is_an_error() -> None:
    def flat(data: Arrays, states: Arrays) -> Arrays:
        results = model()(data, states)
        return {**results, "y": results["y"][0]}

    with pytest.raises(ParityError, match=r"y: has shape \(1, 3\) in the reference and \(3,\)"):
        check(model(), flat)


def test_clips_differ_in_kind_and_repeat() -> None:
    rough, smooth = ([frame["x"] for frame in clip] for clip in clips())
    assert np.abs(smooth[1] - smooth[0]).max() < 0.05 < np.abs(rough[1] - rough[0]).max()
    for clip in clips():
        np.testing.assert_array_equal([f["x"] for f in clip], [f["x"] for f in clip])
