"""Corpora of clips: whole outputs or none, what a second call runs, failures, processes that are killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell.errors import InputError, UsageError
from stepcell.runtime.corpus.clip_runner import ClipResult
from stepcell.runtime.corpus.job import Clip, Job
from stepcell.runtime.corpus.local_pool import LocalPool
from stepcell.runtime.corpus.map_clips import MapProgress, MapReport, map_clips, parse_shard, read_list
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.streams.run import run_streams
from stepcell.runtime.streams.run_control import RunControl
from tests.runtime.media.clips import write_clip

Model = Callable[..., Path]
LONG = 300_000  # frames: some ten seconds


def write_array(path: Path, count: int, value: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.full((count, 2, 2, 3), value, np.uint8))
    return path


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Four clips, one in a folder of its own."""
    folder = tmp_path / "clips"
    for number in range(3):
        write_array(folder / f"{number}.npy", 3 + number)
    write_array(folder / "deep/3.npy", 7)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


def counts(report: MapReport) -> tuple[int, int, int, int]:
    return report.made, report.finished_before, len(report.failed), report.not_run


def test_outputs_are_those_of_run_and_a_second_call_runs_what_is_left(
    accumulator: Model, clips: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    model, source, out = accumulator(), f"{clips}/**/*.npy", tmp_path / "out"
    seen: list[MapProgress] = []
    report = map_clips(model, source, out, workers=2, progress=seen.append)
    assert (counts(report), report.frames, report.workers) == ((4, 0, 0, 0), 19, 2)
    assert (seen[-1].done, seen[-1].frames, seen[-1].left) == (4, 19, 0)
    names = ["0.npy", "1.npy", "2.npy", "deep/3.npy"]
    assert files(out) == [*(f".stepcell-map/{name}.json" for name in names), *names]
    run_streams(model, source, tmp_path / "run", backend="onnxruntime")
    assert all((out / name).read_bytes() == (tmp_path / "run" / name).read_bytes() for name in names)

    before = {name: (out / name).stat().st_ino for name in names}
    assert counts(map_clips(model, source, out)) == (0, 4, 0, 0)
    assert "4 of 4 clips are finished already" in logged.text
    (out / "1.npy").unlink()
    write_array(clips / "2.npy", 9, 2)
    report = map_clips(model, source, out)
    assert (counts(report), report.frames) == ((2, 2, 0, 0), 4 + 9)
    assert "1 outputs whose clips have changed since are made again" in logged.text
    assert np.load(out / "2.npy")[:, 0, 0, 0].tolist() == list(range(2, 20, 2))
    assert [name for name in names if (out / name).stat().st_ino == before[name]] == ["0.npy", "deep/3.npy"]


def test_shards_share_a_folder_of_outputs(accumulator: Model, clips: Path, tmp_path: Path) -> None:
    model, source, out = accumulator(), f"{clips}/**/*.npy", tmp_path / "out"
    first = map_clips(model, source, out, shard=(2, 3), workers=1)
    assert (counts(first), files(out)[1:]) == ((1, 0, 0, 0), ["1.npy"])
    second = map_clips(model, source, out, shard=(1, 3), workers=1)
    assert (counts(second), first.clips + second.clips) == ((2, 0, 0, 0), 3)
    assert counts(map_clips(model, source, out, workers=1)) == (1, 3, 0, 0)
    assert parse_shard("2/3") == (2, 3)
    for text in ("0/3", "4/3", "1", "1/0", "-1/2", "a/b", "1/2/3"):
        with pytest.raises(UsageError, match="--shard: expected NUMBER/COUNT"):
            parse_shard(text)


def test_failures_are_listed_and_leave_no_output(
    accumulator: Model, clips: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """What was there before a clip became unreadable stays, and is tried again."""
    model, out = accumulator(), tmp_path / "out"
    cut = clips / "video.mkv"
    write_clip(cut, [np.full((16, 16, 3), 9, np.uint8)] * 50)
    assert counts(map_clips(model, clips, out, workers=1)) == (4, 0, 0, 0)
    whole = (out / "video.mkv").read_bytes()
    os.truncate(cut, cut.stat().st_size - 200)
    (clips / "1.npy").write_bytes(b"no array")
    clip_list = tmp_path / "list.txt"
    clip_list.write_text(f"{cut}\n\n{tmp_path}/missing.npy\r\n{clips}/1.npy\n{clips}/2.npy\n{clips}/2.npy\n")
    report = map_clips(model, read_list(str(clip_list)), tmp_path / "list", workers=1)
    assert counts(report) == (1, 0, 3, 0)
    reasons = {Path(each.input).name: each.error for each in report.failed}
    assert list(reasons) == ["video.mkv", "missing.npy", "1.npy"]
    assert "truncated: 200 bytes are missing" in reasons["video.mkv"]
    assert "No such file" in reasons["missing.npy"]
    assert "not a readable .npy array" in reasons["1.npy"]
    assert not any(".stepcell-map" in reason or str(tmp_path / "list") in reason for reason in reasons.values())
    kept = str((clips / "2.npy").relative_to("/"))  # folders of a list are kept as they are written
    assert files(tmp_path / "list") == [f".stepcell-map/{kept}.json", kept]
    assert counts(map_clips(model, clips, out, workers=1)) == (0, 2, 2, 0)
    assert (out / "video.mkv").read_bytes() == whole
    assert counts(map_clips(model, clips, out, workers=1)) == (0, 2, 2, 0)


def pool_of(model: Path, out: Path, names: list[str], workers: int) -> tuple[LocalPool, list[Clip]]:
    (work := out / "work").mkdir(parents=True)
    (out.parent / "clips").mkdir(exist_ok=True)
    clips = [Clip(out.parent / "clips" / name, out / name) for name in names]
    return LocalPool(Job(model, out, {}), workers, work), clips


@pytest.mark.parametrize("kills", [1, 2])
def test_a_killed_process_costs_its_clip_only(
    accumulator: Model, clips: Path, tmp_path: Path, kills: int, logged: pytest.LogCaptureFixture
) -> None:
    """It is run again after the others, and listed if it is killed once more."""
    pool, todo = pool_of(accumulator(), tmp_path / "out", ["long.npy", "0.npy", "1.npy"], 1)
    write_array(todo[0].source, LONG)
    results: dict[str, ClipResult] = {}
    killed: list[Any] = []

    def kill() -> None:
        for process in pool._alive:
            if process.clip is todo[0] and process.process not in killed and len(killed) < kills:
                process.process.kill()
                killed.append(process.process)

    def done(clip: Clip, result: ClipResult) -> None:
        results[clip.source.name] = result
        if len(results) == 2 and kills == 1:  # before it is run again
            write_array(todo[0].source, 5)

    pool.run(todo, done, RunControl(), kill)
    assert list(results) == ["0.npy", "1.npy", "long.npy"]
    assert logged.text.count("was killed by SIGKILL (out of memory?); it is run again after the others") == 1
    if kills == 1:
        assert results["long.npy"] == ClipResult(5)
    else:
        assert "its worker was killed by SIGKILL (out of memory?), twice" in str(results["long.npy"].error)
    assert [results[name].frames for name in ("0.npy", "1.npy")] == [3, 4]
    assert not list((tmp_path / "out/work").iterdir())


def test_a_process_that_is_killed_without_a_clip_costs_nothing(
    accumulator: Model, clips: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    pool, todo = pool_of(accumulator(), tmp_path / "out", ["long.npy", "0.npy"], 2)
    write_array(todo[0].source, LONG // 10)
    results: dict[str, ClipResult] = {}
    killed: list[Any] = []

    def kill() -> None:
        for process in pool._alive:
            if process.ready and process.clip is None and results and not killed:
                process.process.kill()
                killed.append(process)

    pool.run(todo, lambda clip, result: results.update({clip.source.name: result}), RunControl(), kill)
    assert (len(killed), list(results)) == (1, ["0.npy", "long.npy"])
    assert results["long.npy"] == ClipResult(LONG // 10)
    assert "was killed" not in logged.text


def test_a_stop_drops_what_is_not_finished(accumulator: Model, clips: Path, tmp_path: Path) -> None:
    model, out, control = accumulator(), tmp_path / "out", RunControl()
    write_array(clips / "9.npy", LONG)

    def stop(progress: MapProgress) -> None:
        if progress.done == 3 and progress.frames > 50:  # in the long one
            control.stop()

    report = map_clips(model, clips, out, workers=1, progress=stop, control=control)
    assert counts(report) == (3, 0, 0, 1)
    assert files(out) == [*(f".stepcell-map/{number}.npy.json" for number in range(3)), "0.npy", "1.npy", "2.npy"]
    assert not [each for each in (out / ".stepcell-map").iterdir() if each.is_dir()]
    write_array(clips / "9.npy", 2)
    assert counts(map_clips(model, clips, out, workers=1)) == (1, 3, 0, 0)


def test_what_cannot_be_opened_or_is_refused_ends_the_run(accumulator: Model, clips: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "broken.onnx", tmp_path / "out"
    broken.write_bytes(b"no model")
    with pytest.raises(InputError, match=r"broken\.onnx"):
        map_clips(broken, clips, out)
    with pytest.raises(InputError, match="cannot be read"):
        map_clips(tmp_path / "none.onnx", clips, out)
    with pytest.raises(UsageError, match="--fps and --audio copy"):
        map_clips(accumulator(), clips, out, workers=1, fps=25, audio="copy")
    assert files(out) == []


def test_names_that_are_refused(accumulator: Model, clips: Path, tmp_path: Path) -> None:
    model, nothing = accumulator(), tmp_path / "nothing.txt"
    nothing.write_text("\n \n")
    (clips / "out").mkdir()
    map_clips(model, f"{clips}/0.npy", clips / "out")
    refused: list[tuple[Any, Any, str]] = [
        (clips, clips, "also used as an input"),
        (f"{clips}/**/*.npy", clips / "out", "is an output of `stepcell map` in"),
        ("camera:0", tmp_path / "out", "cannot be read"),
        (tmp_path / "none", tmp_path / "out", "cannot be read"),
        (clips, tmp_path / "out.npy", "one file for 3 clips"),
        ([Path("a/../b.npy")], tmp_path / "out", "would lie outside the folder"),
    ]
    for source, output, said in refused:
        with pytest.raises((UsageError, InputError), match=said):
            map_clips(model, source, output)
    with pytest.raises(InputError, match="names no clips"):
        read_list(str(nothing))
    nothing.write_text(f"{clips}\n")
    with pytest.raises(UsageError, match="is a folder of clips"):
        read_list(str(nothing))
    with pytest.raises(InputError, match="cannot be read"):
        read_list(str(tmp_path / "none.txt"))


def test_folders_of_pictures_in_and_out(accumulator: Model, tmp_path: Path) -> None:
    """A folder of a list is a clip, and an output that is a folder is replaced as a whole."""
    model, out = accumulator(), str(tmp_path / "out" / "*")
    clip = write_array(tmp_path / "clips/a.npy", 3, 2)
    assert counts(map_clips(model, clip, out, workers=1)) == (1, 0, 0, 0)
    pictures = tmp_path / "out/a"
    assert [each.name for each in sorted(pictures.iterdir())] == ["000000.png", "000001.png", "000002.png"]
    write_array(clip, 2, 5)
    assert counts(map_clips(model, clip, out, workers=1)) == (1, 0, 0, 0)
    assert [int(frame.max()) for frame in open_source(str(pictures))] == [5, 10]
    report = map_clips(model, [pictures], str(tmp_path / "sums/*.npy"), workers=1)
    assert (counts(report), report.frames) == ((1, 0, 0, 0), 2)
    (found,) = (tmp_path / "sums").rglob("a.npy")
    assert np.load(found)[:, 0, 0, 0].tolist() == [5, 15]
