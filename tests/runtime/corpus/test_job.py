"""Which clips are left to run, and which existing outputs are refused; without running any."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np
import pytest

from stepcell.errors import UsageError
from stepcell.pixels import Pixels
from stepcell.runtime.corpus.clip_runner import ClipResult, ClipRunner
from stepcell.runtime.corpus.job import Job, left_to_run
from stepcell.runtime.corpus.record import model_sha256, read_record, record_path, write_record
from stepcell.runtime.streams.run_control import RunControl

Model = Callable[..., Path]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.npy"
    np.save(path, np.ones((3, 2, 2, 3), np.uint8))
    return path


def make(job: Job, source: Path, target: Path) -> None:
    """Run one clip in this process."""
    (todo,) = left_to_run(job, [source], [target], overwrite=True)
    (work := job.root / "work").mkdir(parents=True, exist_ok=True)
    runner = ClipRunner(job, work)
    assert runner.run(todo, lambda _: None, RunControl()) == ClipResult(3)
    runner.close()


def test_options_that_matter_are_compared(accumulator: Model, clip: Path, tmp_path: Path) -> None:
    model, out = accumulator(), tmp_path / "out"
    target = out / "clip.npy"
    plain = {"device": "cpu", "pixels": {}, "fps": None, "on_nonfinite": "stop", "reset_on_cut": False}
    make(Job(model, out, plain), clip, target)
    for same in ({}, {"check_file": False}, {"device": "cuda"}, {"allow_fallback": True}):
        assert left_to_run(Job(model, out, {**plain, **same}), [clip], [target]) == []
    for options, said in (
        ({"limit": 2}, "limit: default, now 2"),
        ({"fps": Fraction(30000, 1001)}, "fps: default, now 30000/1001"),
        ({"pixels": {"": Pixels(range=(0, 1))}}, "pixels: default, now"),
        ({"keep_float16": True}, "keep_float16: default, now True"),
    ):
        with pytest.raises(UsageError, match=f"was made with other options: {said}"):
            left_to_run(Job(model, out, {**plain, **options}), [clip], [target])
    limited = Job(model, out, {"limit": 3, "fps": Fraction(10)})
    make(limited, clip, target)
    assert left_to_run(Job(model, out, {"fps": Fraction("10.0"), "limit": 3}), [clip], [target]) == []


def test_another_model_is_never_taken_for_this_one(accumulator: Model, clip: Path, tmp_path: Path) -> None:
    model, out = accumulator(), tmp_path / "out"
    target = out / "clip.npy"
    make(Job(model, out, {}), clip, target)
    other = tmp_path / "other.onnx"
    other.write_bytes(model.read_bytes() + b"\0")
    assert model_sha256(model) != model_sha256(other)
    with pytest.raises(UsageError, match=r"was made by another model: SHA-256 .*, and so were 1 more") as caught:
        left_to_run(Job(other, out, {}), [clip, clip], [target, target])
    assert "--overwrite" in str(caught.value.hint)
    assert len(left_to_run(Job(other, out, {}), [clip], [target], overwrite=True)) == 1


def test_weights_beside_a_model_belong_to_it(accumulator: Model, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    path = tmp_path / "beside.onnx"
    model = onnx.load(accumulator())
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1000, np.float32), "unused"))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin")
    before = model_sha256(path)
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[7] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    assert model_sha256(path) != before


def test_records_that_do_not_hold(
    accumulator: Model, clip: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """Each makes the clip run again: a changed record or output, a clip that was touched."""
    job = Job(accumulator(), tmp_path / "out", {})
    target = job.root / "clip.npy"
    make(job, clip, target)
    path = record_path(job.root, target)
    record, whole = read_record(path), path.read_bytes()
    assert record is not None
    assert (record.frames, record.output_size) == (3, target.stat().st_size)

    path.write_bytes(whole.replace(b'"frames": 3', b'"frames": 4'))
    assert read_record(path) is None
    assert "is damaged, or of another stepcell" in logged.text
    assert len(left_to_run(job, [clip], [target])) == 1
    for damaged in (b"", b"{}", whole[:-9], b"\xff" + whole):
        path.write_bytes(damaged)
        assert read_record(path) is None
    write_record(path, msgspec.structs.replace(record, schema="2.0"))
    assert read_record(path) is None
    path.write_bytes(whole)
    assert left_to_run(job, [clip], [target]) == []

    with target.open("ab") as file:
        file.write(b"\0")
    assert len(left_to_run(job, [clip], [target])) == 1
    make(job, clip, target)
    os.utime(clip, ns=(1, 1))
    assert len(left_to_run(job, [clip], [target])) == 1


def test_foreign_files_stay(accumulator: Model, clip: Path, tmp_path: Path) -> None:
    job = Job(accumulator(), tmp_path / "out", {})
    job.root.mkdir()
    array, folder = job.root / "clip.npy", job.root / "clip"
    np.save(array, np.ones(3))
    (folder / "thesis").mkdir(parents=True)
    for target in (array, folder, job.model):
        with pytest.raises(UsageError, match=r"exists already|is a folder with files|also used as|is not in"):
            left_to_run(Job(job.model, target.parent, {}), [clip], [target])
    assert len(left_to_run(job, [clip], [array], overwrite=True)) == 1


def test_a_link_to_the_input_is_the_input(accumulator: Model, clip: Path, tmp_path: Path) -> None:
    job = Job(accumulator(), tmp_path / "out", {})
    job.root.mkdir()
    for link in (os.symlink, os.link):
        (target := job.root / "clip.npy").unlink(missing_ok=True)
        link(clip, target)
        with pytest.raises(UsageError, match="also used as an input"):
            left_to_run(job, [clip], [target], overwrite=True)
