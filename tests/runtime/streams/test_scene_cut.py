"""Scene cut detection on real clips: all cuts and no false alarm."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import chain

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.models.zoo.clips import read_clip
from stepcell.runtime.streams.scene_cut import THRESHOLD, SceneCut

# First frames of a scene, found by eye.
CUTS = {"bikes": [30, 76, 137, 187, 242], "bigbuckbunny": [], "carphone_pristine": [], "carphone_distorted": []}


def distances(frames: Iterable[NDArray[np.generic]]) -> NDArray[np.float64]:
    cut = SceneCut()
    return np.array([cut.distance(frame) for frame in frames])


@pytest.fixture(scope="module")
def clips() -> dict[str, NDArray[np.uint8]]:
    return {name: read_clip(name) for name in CUTS if name != "bigbuckbunny"} | {
        "bigbuckbunny": read_clip("bigbuckbunny", shrink=2)
    }


def test_cuts_within_clips_and_no_false_alarm(clips: dict[str, NDArray[np.uint8]]) -> None:
    lowest, highest = 2.0, 0.0
    for name, frames in clips.items():
        found = distances(frames)
        assert np.flatnonzero(found > THRESHOLD).tolist() == CUTS[name], name
        lowest = min([lowest, *found[CUTS[name]]])
        highest = max(highest, np.delete(found, CUTS[name]).max())
    print(f"lowest cut {lowest:.3f}, highest distance without one {highest:.3f}")
    assert lowest > THRESHOLD + 0.1
    assert highest < THRESHOLD - 0.1


def test_two_clips_joined(clips: dict[str, NDArray[np.uint8]]) -> None:
    def fit(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        rows, columns = (np.arange(n) * size // n for n, size in zip((144, 176), frames.shape[1:3], strict=True))
        return frames[:, rows][:, :, columns]

    lowest = 2.0
    scenes = {name: fit(clips[name]) for name in ("bikes", "bigbuckbunny", "carphone_pristine")}
    for first, second in ((a, b) for a in scenes for b in scenes if a != b):
        for at in (10, 22, 60):  # within one scene of each clip
            joined = chain(scenes[first][at - 5 : at], scenes[second][at : at + 5])
            found = distances(joined)
            assert np.flatnonzero(found > THRESHOLD).tolist() == [5], f"{first} {second} {at}: {found}"
            lowest = min(lowest, found[5])
    print(f"lowest distance at a join {lowest:.3f}")


def test_brightness_and_a_model_s_range_do_not_matter(clips: dict[str, NDArray[np.uint8]]) -> None:
    pixels = clips["carphone_pristine"][:10]
    tensors = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(distances(tensors), distances(pixels), atol=1e-5)
    lit = pixels.astype(float)
    lit[5:] = lit[5:] * 0.5 + 100  # a light is switched on
    assert distances(lit.astype(np.uint8)).max() < 0.02


def test_pictures_of_one_colour() -> None:
    black, white = np.zeros((40, 50, 3), np.uint8), np.full((40, 50, 3), 255, np.uint8)
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    assert distances([black, black, white, picture, picture, black]).tolist() == pytest.approx(
        [0, 0, 0, 1, 0, 1], abs=1e-6
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 300, 3), (17, 5, 1), (1081, 1923, 3)])
def test_any_size(shape: tuple[int, int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    assert 0 <= distances(frames)[1] <= 2


def test_cost_does_not_grow_with_the_frame() -> None:
    cut, frame = SceneCut(), np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), np.uint8)
    best = np.inf
    for _ in range(50):
        started = time.perf_counter()
        cut.distance(frame)
        best = min(best, time.perf_counter() - started)
    print(f"{best * 1e6:.0f} us for a frame of 1920x1080")
    assert best < 2e-3


def test_a_picture_of_another_size_is_unrelated() -> None:
    """A camera that reconnects with another size; the frame is refused later."""
    cut = SceneCut()
    cut.distance(np.random.default_rng(0).integers(0, 256, (144, 176, 3), np.uint8))
    assert cut.distance(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)) == 1.0
