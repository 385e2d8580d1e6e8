"""Resizing: sizes, proportions, and what is said about them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from stepcell.contract import TensorSpec
from stepcell.errors import InputError, UsageError
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.resize import Resize, ResizedSource, fit_inside, resize
from tests.fakes.frame_source import FrameSource
from tests.runtime.media.clips import marked, write_clip
from tests.runtime.media.frames import noise, write_all

FIXED = TensorSpec(name="x", shape=(1, 3, 64, 96))
FREE = TensorSpec(name="x", shape=(1, 3, "height", "width"))


@pytest.mark.parametrize(
    ("text", "size", "fit"),
    [("640x360", (640, 360), False), ("640x360,fit", (640, 360), True), ("fit", (96, 64), True),
     ("stretch", (96, 64), False), ("8x6,stretch", (8, 6), False)],
)  # fmt: skip
def test_parse(text: str, size: tuple[int, int], fit: bool) -> None:
    assert Resize.parse(text, FIXED) == Resize(size, fit)


@pytest.mark.parametrize("text", ["", ",", "640", "640x", "0x5", "640x360,crop", "model.onnx", "999999x1"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="--resize: expected WIDTHxHEIGHT"):
        Resize.parse(text, FIXED)


def test_a_model_of_any_size_needs_one() -> None:
    with pytest.raises(UsageError, match="size of x is not fixed") as caught:
        Resize.parse("fit", FREE)
    assert "--resize 640x360,fit" in str(caught.value.hint)


def test_shrinking_averages_and_enlarging_interpolates() -> None:
    """A pattern of single columns becomes grey; a ramp stays a ramp."""
    columns = np.zeros((40, 60, 1), np.uint8)
    columns[:, ::2] = 200
    assert np.abs(resize(columns, (15, 10))[:, 1:-1].astype(int) - 100).max() <= 2
    ramp = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (40, 60, 3))
    larger = resize(np.ascontiguousarray(ramp), (120, 80))
    assert larger.shape == (80, 120, 3)
    expected = np.clip((np.arange(120) + 0.5) / 2 - 0.5, 0, 59) * 4
    assert np.abs(larger - expected[None, :, None]).max() <= 1.5


@pytest.mark.parametrize("channels", [1, 3])
def test_one_colour_stays_exact(channels: int) -> None:
    for value in noise(20, channels):
        assert (resize(np.broadcast_to(value, (48, 64, channels)), (31, 17)) == value).all()


def test_fit_has_black_bars() -> None:
    tall = np.full((100, 50, 3), 200, np.uint8)
    fitted = fit_inside(tall, (96, 64))
    assert fitted.shape == (64, 96, 3)
    assert (fitted[:, 32:64] == 200).all()
    assert not fitted[:, :32].any()
    assert not fitted[:, 64:].any()


@pytest.mark.parametrize(
    ("how", "aspect", "said"),
    [(Resize((96, 64)), Fraction(16, 15) * Fraction(8, 9), "width stretched 1.12 times; --resize fit"),
     (Resize((96, 64), fit=True), Fraction(16, 15), "in proportion (85x64, black bars around it)"),
     (Resize((128, 96)), Fraction(16, 15), "64x48 resized to 128x96 (bilinear, antialiased), in proportion; outputs")],
)  # fmt: skip
def test_a_resized_clip_keeps_its_shape_on_screen(
    how: Resize, aspect: Fraction, said: str, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    clip = write_clip(tmp_path / "in.mp4", [marked()] * 3, aspect=Fraction(16, 15))
    source = ResizedSource(open_source(str(clip)), how)
    frames = np.stack(list(source))
    assert frames.shape == (3, how.size[1], how.size[0], 3)
    assert said in logged.text
    assert logged.text.count(" resized to ") == 1
    write_all(open_sink(str(tmp_path / "out.mp4"), Fraction(25), like=source), frames)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == aspect


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_anamorphic_clip_keeps_its_aspect(suffix: str, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "in.mp4", [marked()] * 3, aspect=Fraction(64, 45))
    source = open_source(str(clip))
    write_all(open_sink(str(tmp_path / f"out{suffix}"), Fraction(25), like=source), np.stack(list(source)))
    again = open_source(str(tmp_path / f"out{suffix}"))
    next(iter(again))
    assert source.pixel_aspect == again.pixel_aspect == Fraction(64, 45)


def test_tensors_are_not_resized() -> None:
    source = ResizedSource(FrameSource("tensors", [np.zeros((3, 4, 4), np.float32)]), Resize((8, 8)))
    with pytest.raises(InputError, match=r"--resize takes pixels \(uint8\), not tensors of float32"):
        list(source)
