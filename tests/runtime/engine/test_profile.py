from __future__ import annotations

from typing import Any

import pytest

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import UsageError
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.engine.profile import Profile, data_shapes, derive_profiles

IMAGE = ("batch", 3, "height", "width")
DYNAMIC = StepContract(
    inputs=(TensorSpec(name="x", shape=IMAGE, layout="NCHW", pad_multiple=4),),
    outputs=(TensorSpec(name="y", shape=IMAGE),),
    states=(StateSpec(name="h", shape=("batch", 8, "height // 4", "width // 4")),),
    example={"batch": 1, "height": 64, "width": 96},
)
FIXED = StepContract(
    inputs=(TensorSpec(name="x", shape=(1, 3, 64, 96)),),
    outputs=(TensorSpec(name="y", shape=(1, 3, 64, 96)),),
    states=(StateSpec(name="h", shape=(1, 8, 16, 24)),),
)
TWO_INPUTS = StepContract(
    inputs=(TensorSpec(name="x", shape=IMAGE), TensorSpec(name="flow", shape=("batch", 2, "height", "points"))),
    outputs=(TensorSpec(name="y", shape=IMAGE),),
    states=(),
    example={"batch": 1, "height": 64, "width": 96, "points": 5},
)


def options(**levels: tuple[int, ...]) -> BuildOptions:
    return BuildOptions(**{f"{level}_shapes": {"x": shape} for level, shape in levels.items()})


def test_without_shapes_the_exported_sizes_are_used() -> None:
    profiles = derive_profiles(DYNAMIC, BuildOptions())
    assert profiles["x"] == Profile(*[(1, 3, 64, 96)] * 3)
    assert profiles["state_in.h"] == Profile(*[(1, 8, 16, 24)] * 3)
    assert data_shapes(DYNAMIC, profiles) == "x:1x3x64x96"


def test_state_profiles_follow_from_the_inputs() -> None:
    profiles = derive_profiles(DYNAMIC, options(min=(1, 3, 32, 32), opt=(2, 3, 64, 96), max=(4, 3, 128, 128)))
    assert profiles["state_in.h"] == Profile((1, 8, 8, 8), (2, 8, 16, 24), (4, 8, 32, 32))
    assert data_shapes(DYNAMIC, profiles) == "x:1x3x32x32 to x:4x3x128x128"


SMALL, MIDDLE, LARGE = (1, 3, 32, 32), (1, 3, 64, 64), (1, 3, 96, 96)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"opt": MIDDLE}, (MIDDLE, MIDDLE, MIDDLE)),
        ({"max": LARGE}, (LARGE, LARGE, LARGE)),
        ({"min": SMALL}, (SMALL, SMALL, SMALL)),
        ({"min": SMALL, "max": LARGE}, (SMALL, LARGE, LARGE)),
        ({"min": SMALL, "opt": MIDDLE}, (SMALL, MIDDLE, MIDDLE)),
        ({"opt": MIDDLE, "max": LARGE}, (MIDDLE, MIDDLE, LARGE)),
    ],
)
def test_a_level_that_is_not_given_takes_anothers(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert derive_profiles(DYNAMIC, options(**given))["x"] == Profile(*expected)


@pytest.mark.parametrize(
    ("contract", "shapes", "message"),
    [
        (DYNAMIC, {"opt_shapes": {"z": (1,)}}, "--optShapes: the model has no input 'z' (it has x, state_in.h)"),
        (DYNAMIC, {"max_shapes": {"x": (1, 4, 64, 64)}}, "--maxShapes: x: expected shape (batch, 3, height, width)"),
        (DYNAMIC, {"opt_shapes": {"x": (1, 3, 64)}}, "got (1, 3, 64)"),
        (DYNAMIC, {"opt_shapes": {"x": (1, 3, 66, 64)}}, "multiples of 4, got (1, 3, 66, 64)"),
        (DYNAMIC, {"opt_shapes": {"x": (1, 3, 64, 64), "state_in.h": (1, 8, 64, 64)}}, "determine (1, 8, 16, 16), got"),
        (DYNAMIC, {"opt_shapes": {"state_in.h": (1, 8, 16, 16)}}, "--optShapes: no shape for input 'x'"),
        (DYNAMIC, {"min_shapes": {"x": LARGE}, "opt_shapes": {"x": SMALL}}, "min <= opt <= max"),
        (FIXED, {"opt_shapes": {"x": (1, 3, 64, 64)}}, "expected shape (1, 3, 64, 96), got (1, 3, 64, 64)"),
        (TWO_INPUTS, {"opt_shapes": {"x": SMALL}}, "no shape for input 'flow'"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(contract: StepContract, shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        derive_profiles(contract, BuildOptions(**shapes))
    assert message in caught.value.message


def test_a_state_given_consistently_is_accepted() -> None:
    shapes = {"x": (1, 3, 64, 64), "state_in.h": (1, 8, 16, 16)}
    assert derive_profiles(DYNAMIC, BuildOptions(opt_shapes=shapes)) == derive_profiles(DYNAMIC, options(opt=MIDDLE))


def test_fixed_model_needs_no_shapes_and_accepts_its_own() -> None:
    own = derive_profiles(FIXED, options(opt=(1, 3, 64, 96)))
    assert own == derive_profiles(FIXED, BuildOptions())
    assert own["state_in.h"].is_fixed


def test_the_missing_input_is_suggested_at_the_exported_size() -> None:
    with pytest.raises(UsageError) as caught:
        derive_profiles(TWO_INPUTS, options(opt=SMALL))
    assert caught.value.hint == "add it, such as flow:1x2x64x5"


def test_profile_contains_the_shapes_between() -> None:
    profile = Profile((1, 8), (2, 8), (4, 16))
    assert (4, 16) in profile
    assert (5, 16) not in profile
    assert (4,) not in profile
