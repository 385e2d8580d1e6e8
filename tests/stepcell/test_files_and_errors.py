"""Atomic files, and the error hierarchy's exit codes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from stepcell import errors
from stepcell.errors import InputError, OutputError, StepcellError, UsageError
from stepcell.files import atomic_path, human_size, read_bytes, write_atomic
from stepcell.shapes import format_shapes, parse_shapes


def test_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")

    def break_half_way() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_half_way()
    assert path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_written_file_has_ordinary_permissions_and_the_umask_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda _: pytest.fail("the umask belongs to the whole process"))
            write_atomic(tmp_path / "model.onnx", "new")
        assert stat.S_IMODE((tmp_path / "model.onnx").stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_unwritable_places(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        write_atomic(tmp_path, "x")
    with pytest.raises(OutputError, match="cannot be written"):
        write_atomic(tmp_path / "missing" / "file", "x")
    with pytest.raises(InputError, match="cannot be read"):
        read_bytes(tmp_path / "missing")


def test_exit_codes_are_those_of_the_documentation() -> None:
    documented = {"UsageError": 2, "ParityError": 3, "EngineMismatchError": 4, "MissingDependencyError": 5}
    documented |= {"PluginError": 5, "DeviceError": 6}
    for name in errors.__all__:
        assert getattr(errors, name).exit_code == documented.get(name, 1), name
        assert issubclass(getattr(errors, name), StepcellError)


def test_hint_is_part_of_the_text() -> None:
    assert str(InputError("x: wrong", hint="do this")) == "x: wrong\nHint: do this"


@pytest.mark.parametrize(
    ("size", "text"), [(7, "7 B"), (1_234_567, "1.2 MB"), (5_000, "5.0 kB"), (3 * 10**9, "3.0 GB")]
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert human_size(size) == text


def test_shapes_as_trtexec_spells_them() -> None:
    shapes = parse_shapes("x:1x3x256x256,model.flow:2X2", option="--shape")
    assert shapes == {"x": (1, 3, 256, 256), "model.flow": (2, 2)}
    assert parse_shapes(format_shapes(shapes), option="--shape") == shapes


@pytest.mark.parametrize(
    "text", ["", "x", "x:", ":1x2", "x:1x-2", "x:1x0", "x:1.5", "x:1xtwo", "x:1,x:2", "x:1x2,", "x:²"]
)
def test_bad_shapes(text: str) -> None:
    with pytest.raises(UsageError, match="--shape"):
        parse_shapes(text, option="--shape")


LEAVE = """
import os, sys
from pathlib import Path
from stepcell.files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    print("ready", flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
    sys.stdin.read()
"""


def started(path: Path, end: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVE, str(path), end], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_temporary_files_of_killed_processes_are_removed_and_those_in_use_stay(tmp_path: Path) -> None:
    used = started(tmp_path / "used.onnx", "waits")
    started(tmp_path / "killed.onnx", "killed").communicate()
    foreign = tmp_path / ".killed.0123abcd.onnx"
    foreign.write_text("of another program")
    assert len(list(tmp_path.glob(".killed.*.stepcell.onnx"))) == 1
    write_atomic(tmp_path / "other.json", "{}")
    assert not list(tmp_path.glob(".killed.*.stepcell.onnx"))
    assert len(list(tmp_path.glob(".used.*"))) == 1
    used.communicate(b"")
    assert sorted(tmp_path.iterdir()) == [foreign, tmp_path / "other.json", tmp_path / "used.onnx"]


def test_a_result_is_kept_when_it_cannot_be_moved_into_place(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"

    def collide() -> None:
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"result")
            target.mkdir()
            (target / "foreign").touch()

    with pytest.raises(OutputError, match="cannot be written") as caught:
        collide()
    (kept,) = (path for path in tmp_path.iterdir() if path.is_file())
    assert kept.read_bytes() == b"result"
    assert not kept.name.startswith(".")
    assert str(kept) in str(caught.value.hint)
