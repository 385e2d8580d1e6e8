"""Sound copied from the input, in step with the pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from stepcell.errors import InputError, UsageError
from stepcell.runtime.streams.run import run_streams
from tests.runtime.media.clips import timestamps, write_clip

Model = Callable[..., Path]
FRAMES = [np.full((16, 16, 3), 4 * n, np.uint8) for n in range(50)]


def sound(path: Path) -> tuple[float, float]:
    """Start and end of the sound, in seconds."""
    with av.open(str(path)) as container:
        frames = [frame for frame in container.decode(audio=0) if frame.time is not None]
    last = frames[-1]
    assert last.time is not None
    assert frames[0].time is not None
    return frames[0].time, last.time + last.samples / last.sample_rate


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("start", [0, 250], ids=["from zero", "from 10 s"])
def test_sound_is_copied_with_the_pictures(suffix: str, start: int, accumulator: Model, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "in.mkv", FRAMES, sound="aac", start=start)
    output = tmp_path / f"out{suffix}"
    run_streams(accumulator(), clip, output, audio="copy")
    assert timestamps(output) == [pytest.approx(n / 25, abs=1e-3) for n in range(50)]
    began, ended = sound(output)
    assert began == pytest.approx(0, abs=0.03)
    assert ended == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_of_a_transport_stream(suffix: str, accumulator: Model, tmp_path: Path) -> None:
    """Its AAC has a header in every packet, which other formats do not take."""
    clip = write_clip(tmp_path / "in.ts", FRAMES, sound="aac", codec="mpeg2video")
    run_streams(accumulator(), clip, tmp_path / f"out{suffix}", audio="copy")
    assert sound(tmp_path / f"out{suffix}") == (pytest.approx(0, abs=0.03), pytest.approx(2, abs=0.05))


def test_sound_ends_with_the_pictures(accumulator: Model, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "in.mp4", FRAMES, sound="aac")
    run_streams(accumulator(), clip, tmp_path / "out.mp4", audio="copy", limit=20)
    assert sound(tmp_path / "out.mp4")[1] == pytest.approx(0.8, abs=0.05)


def test_without_it_a_line_says_so(accumulator: Model, tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    clip = write_clip(tmp_path / "in.mp4", FRAMES[:3], sound="aac")
    run_streams(accumulator(), clip, tmp_path / "out.mp4")
    assert f"{clip}: its sound is not written; --audio copy copies it" in logged.text
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert not container.streams.audio
    logged.clear()
    run_streams(accumulator(), clip, tmp_path / "out.npy")
    assert "sound" not in logged.text


def test_what_cannot_be_copied_is_refused(accumulator: Model, tmp_path: Path) -> None:
    silent = write_clip(tmp_path / "silent.mp4", FRAMES[:3])
    other = write_clip(tmp_path / "other.avi", FRAMES[:3], sound="adpcm_ms")
    model = accumulator()
    with pytest.raises(InputError, match=r"silent\.mp4: has no sound to copy"):
        run_streams(model, silent, tmp_path / "out.mp4", audio="copy")
    with pytest.raises(UsageError, match=r"adpcm_ms sound, which \.mp4 cannot hold"):
        run_streams(model, other, tmp_path / "out.mp4", audio="copy")
    with pytest.raises(UsageError, match=r"--audio copy: .*out\.npy is no video"):
        run_streams(model, other, tmp_path / "out.npy", audio="copy")
    with pytest.raises(UsageError, match="--fps and --audio copy"):
        run_streams(model, other, tmp_path / "out.mkv", audio="copy", fps=25)
    with pytest.raises(UsageError, match="--audio copy: keeps the timestamps"):
        run_streams(model, other, tmp_path / "out.mkv", audio="copy", timestamps="constant")
    np.save(tmp_path / "in.npy", np.stack(FRAMES[:3]))
    with pytest.raises(InputError, match="cannot be opened"):
        run_streams(model, tmp_path / "in.npy", tmp_path / "out.mkv", audio="copy")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.npy", "other.avi", "silent.mp4", "sum.onnx"]
