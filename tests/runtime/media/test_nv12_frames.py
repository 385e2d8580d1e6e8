"""Frames of videos, pictures and pipes as NV12, against the RGB that they are read as without it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell import Nv12, open_source
from stepcell.contract import TensorSpec
from stepcell.errors import InputError, UsageError
from stepcell.nv12 import nv12_planes, nv12_to_rgb, rows_of
from stepcell.pixels import PixelConversion
from stepcell.runtime.media.raw_frames import RawSource
from stepcell.runtime.media.resize import Resize, ResizedSource
from tests.runtime.media.clips import marked, write_clip

av = pytest.importorskip("av")

Array = np.ndarray[Any, Any]
SD = Nv12(matrix="bt601", range="limited")
FULL = Nv12(matrix="bt601", range="full")
HD = Nv12(matrix="bt709", range="limited")


def blocks(count: int = 3) -> list[Array]:
    """Hard edges of colour, on the grid of the chroma samples."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (9, 12, 3), np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(count)]


def both(path: Path, how: Nv12) -> tuple[Array, Array]:
    """The frames as they are read, and as NV12 made RGB."""
    rgb = np.stack([frame.astype(int) for frame in open_source(str(path))])
    given = list(open_source(str(path), nv12=how))
    assert all(frame.dtype == np.uint8 and frame.ndim == 2 for frame in given)
    return rgb, np.rint(np.stack([nv12_to_rgb(frame, how) for frame in given])).astype(int)


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, SD),
        ({"codec": "libx264"}, SD),
        ({"codec": "libx264", "full_range": True}, FULL),
        ({"codec": "mjpeg", "pixels": "yuvj420p", "full_range": True}, FULL),
    ],
)
def test_bytes_of_the_decoder_are_taken_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], how: Nv12
) -> None:
    path = write_clip(tmp_path / "clip.mkv", blocks(), **options)
    rgb, ours = both(path, how)
    apart = np.abs(rgb - ours)
    print(f"worst {apart.max()}, mean {apart.mean():.3f} levels")
    assert apart.max() <= 3
    assert apart.mean() < 1.5
    assert "converted on the host" not in caplog.text
    with av.open(str(path)) as container:
        planes = next(container.decode(video=0)).reformat(format="yuv420p").to_ndarray()
    first = next(iter(open_source(str(path), nv12=how)))
    luma, chroma = nv12_planes(first)
    np.testing.assert_array_equal(luma, planes[:36])
    np.testing.assert_array_equal(chroma.transpose(2, 0, 1).ravel(), planes[36:].ravel())


@pytest.mark.parametrize(
    ("options", "how", "said"),
    [
        ({}, HD, "yuv420p, BT.601 (not stated, and taken as that), limited range: converted on the host"),
        ({"codec": "libx264"}, FULL, "BT.601, full range, and the frames are yuv420p, BT.601 (not"),
        ({"codec": "libx264", "pixels": "yuv444p", "colour": (1, 1, 1)}, HD, "the frames are yuv444p, BT.709, limited"),
        ({"codec": "libx264", "pixels": "yuv420p10le"}, SD, "the frames are yuv420p10le"),
        ({"codec": "ffv1", "pixels": "bgr0"}, HD, "the frames are RGB (bgr0)"),
    ],
)
def test_other_frames_are_converted_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], how: Nv12, said: str
) -> None:
    smooth = [np.stack(np.meshgrid(np.arange(48) * 4 + t, np.arange(36) * 5, indexing="xy"), -1) for t in range(3)]
    frames = [np.dstack([each, each[..., :1] // 2 + 60]).clip(0, 255).astype(np.uint8) for each in smooth]
    rgb, ours = both(write_clip(tmp_path / "clip.mkv", frames, **options), how)
    apart = np.abs(rgb - ours)
    print(f"worst {apart.max()}, mean {apart.mean():.3f} levels")
    assert apart.mean() < 2
    assert np.quantile(apart, 0.99) <= 8
    assert caplog.text.count(said) == 1


def test_what_is_not_nv12_is_refused(tmp_path: Path) -> None:
    odd = write_clip(tmp_path / "odd.mkv", [marked(64, 47)], codec="ffv1")
    with pytest.raises(InputError, match=r"64x47, and NV12 has an even width and height") as caught:
        list(open_source(str(odd), nv12=HD))
    assert "--pixels uint8" in str(caught.value.hint)
    grey = write_clip(tmp_path / "grey.mkv", [marked()], codec="ffv1", pixels="gray")
    with pytest.raises(InputError, match="the frames are greyscale"):
        list(open_source(str(grey), nv12=HD))
    with pytest.raises(UsageError, match="--size 5x4: NV12 has an even width"):
        RawSource(io.BytesIO(), (5, 4), 3, nv12=True)


def test_turned_video(tmp_path: Path) -> None:
    from stepcell.runtime.media.nv12_frames import Nv12Frames
    from stepcell.runtime.media.orientation import Orientation

    frame = av.VideoFrame.from_ndarray(marked(), "rgb24").reformat(format="yuv420p")
    convert = Nv12Frames(SD, "clip")
    for orientation in (Orientation(transpose=True, flip_rows=True), Orientation(flip_columns=True)):
        upright = nv12_to_rgb(convert(frame, Orientation()), SD)
        turned = nv12_to_rgb(convert(frame, orientation), SD)
        np.testing.assert_array_equal(turned, orientation(upright))


def test_raw_frames_on_a_pipe() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, int(rows_of(4)), 6), np.uint8)
    source = RawSource(io.BytesIO(frames.tobytes() + b"x"), (6, 4), 3, nv12=True)
    found = []
    with pytest.raises(InputError, match="ended inside frame 3: 1 of 36 bytes") as caught:
        found.extend(source)
    np.testing.assert_array_equal(found, frames)
    assert "6x4 and NV12" in str(caught.value.hint)


def test_resized_with_bars(tmp_path: Path) -> None:
    spec = TensorSpec(
        name="x",
        shape=(1, 24, 40),
        dtype="uint8",
        converts=PixelConversion(dtype="float32", layout="NCHW", range=(0.0, 1.0), nv12=SD),
    )
    path = write_clip(tmp_path / "clip.mkv", [np.full((24, 24, 3), 250, np.uint8)], codec="ffv1")
    for text in ("fit", "40x16,fit"):  # the size of the model is 40x16
        (frame,) = ResizedSource(open_source(str(path), nv12=SD), Resize.parse(text, spec))
        shown = nv12_to_rgb(frame, SD)
        assert shown.shape == (16, 40, 3)
        assert shown[:, :12].max() < 1
        assert shown[:, 28:].max() < 1
        np.testing.assert_allclose(shown[:, 14:26], 250, atol=3)
    (stretched,) = ResizedSource(open_source(str(path), nv12=SD), Resize.parse("20x8", spec))
    np.testing.assert_allclose(nv12_to_rgb(stretched, SD), 250, atol=3)
    with pytest.raises(UsageError, match="--resize 41x16: x takes NV12"):
        Resize.parse("41x16", spec)
