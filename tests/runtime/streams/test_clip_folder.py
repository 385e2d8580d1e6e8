"""Folders and patterns of clips: each from the initial states, each with an output of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stepcell.errors import InputError, UsageError
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.streams.clip_folder import clip_outputs, find_clips
from stepcell.runtime.streams.report import RunError
from stepcell.runtime.streams.run import run_streams
from tests.runtime.media.clips import write_clip

Model = Callable[..., Path]


def write_array(path: Path, count: int, size: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.ones((count, size, size, 3), np.uint8))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clips of different sizes and lengths, and a file that is no clip."""
    folder = tmp_path / "clips"
    for number, count in ((10, 2), (9, 3)):
        write_array(folder / f"a{number}.npy", count, number)
    write_clip(folder / "b.avi", [np.full((16, 16, 3), 9, np.uint8)] * 4)
    (folder / "notes.txt").touch()
    return folder


def test_each_clip_starts_from_the_initial_states(accumulator: Model, folder: Path, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    report = run_streams(
        accumulator(), folder, tmp_path / "out", progress=lambda run: seen.append([each.name for each in run.streams])
    )
    assert [(Path(each.input).name, each.frames, each.stopped) for each in report.streams] == [
        ("a9.npy", 3, "end of input"), ("a10.npy", 2, "end of input"), ("b.avi", 4, "end of input"),
    ]  # fmt: skip
    assert np.load(tmp_path / "out/a9.npy")[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert np.load(tmp_path / "out/a10.npy")[:, 0, 0, 0].tolist() == [1, 2]
    assert len(list(open_source(str(tmp_path / "out/b.mp4")))) == 4
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert [len(names) for names in (seen[0], seen[-1])] == [1, 3]


def test_patterns_of_inputs_and_outputs(accumulator: Model, folder: Path, tmp_path: Path) -> None:
    write_array(folder / "deep/er/c.npy", 1)
    run_streams(accumulator(), f"{folder}/**/*.npy", str(tmp_path / "out/*-sum.npy"))
    found = sorted(str(each.relative_to(tmp_path / "out")) for each in (tmp_path / "out").rglob("*.npy"))
    assert found == ["a10-sum.npy", "a9-sum.npy", "deep/er/c-sum.npy"]
    assert run_streams(accumulator(), f"{folder}/a?.npy").streams[0].frames == 3


def test_a_clip_that_is_broken_does_not_stop_the_others(accumulator: Model, folder: Path, tmp_path: Path) -> None:
    (folder / "a1.npy").write_bytes(b"no array")
    with pytest.raises(RunError, match=r"a1\.npy: not a readable \.npy array") as caught:
        run_streams(accumulator(), folder, tmp_path / "out")
    assert [each.frames for each in caught.value.report.streams] == [0, 3, 2, 4]
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_one_stream_is_no_folder_of_clips(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/0.png").touch()
    (tmp_path / "odd[1].npy").touch()
    for name in ("pictures", "pictures/*.png", "odd[1].npy", "clips/b.avi", "missing.mp4"):
        assert find_clips(str(tmp_path / name)) is None
    for name in ("-", "camera:0", "rtsp://host/a?b=*"):
        assert find_clips(name) is None


def test_what_is_not_clear_is_asked_for(accumulator: Model, folder: Path, tmp_path: Path) -> None:
    model = accumulator()
    with pytest.raises(InputError, match=r"x\*\.mp4: no file matches"):
        run_streams(model, str(tmp_path / "x*.mp4"))
    with pytest.raises(UsageError, match=r"out\.mp4: one file for 3 clips"):
        run_streams(model, folder, tmp_path / "out.mp4")
    with pytest.raises(UsageError, match="3 clips, which run one after another"):
        run_streams(model, [folder, folder / "b.avi"])
    with pytest.raises(UsageError, match="--snapshot: of one stream"):
        run_streams(model, folder, snapshot=tmp_path / "state.safetensors")
    with pytest.raises(UsageError, match="also used as --input"):
        run_streams(model, folder, folder)
    with pytest.raises(UsageError, match=r"would both be written to .*b\.mp4"):
        clip_outputs(str(folder), [folder / "b.avi", folder / "b.webm"], "out")
    (folder / "thumbnail.jpg").touch()
    with pytest.raises(UsageError, match="holds 3 clips and 1 pictures") as caught:
        run_streams(model, folder, tmp_path / "out")
    assert f"--input '{folder}/*.npy'" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
