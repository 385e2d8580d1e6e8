"""`stepcell map`: what is printed, exit codes, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.command import call

Model = Callable[..., Path]
STEPCELL = (sys.executable, "-m", "stepcell")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(2):
        np.save(folder / f"{number}.npy", np.ones((4, 2, 2, 3), np.uint8))
    return folder


def test_report_and_summary(accumulator: Model, clips: Path, tmp_path: Path) -> None:
    model, out = accumulator(), tmp_path / "out"
    (clips / "bad.npy").write_bytes(b"")
    result = call("map", model, "-i", clips, "-o", out, "--workers", 1, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert [report[name] for name in ("clips", "made", "finished_before", "not_run", "frames")] == [3, 2, 0, 0, 8]
    assert [each["input"] for each in report["failed"]] == [str(clips / "bad.npy")]
    assert "2 of 3 clips, 8 frames" in result.stderr
    assert "1 failed" in result.stderr
    assert f"error: 1 of 3 clips failed:\n  {clips}/bad.npy: not a readable .npy array" in result.stderr
    (clips / "bad.npy").unlink()
    again = call("map", model, "-i", clips, "-o", out)
    assert (again.exit_code, again.stdout) == (0, "")
    assert "0 of 2 clips, 0 frames, 2 finished before" in again.stderr
    other = call("map", model, "-i", clips, "-o", out, "--limit", 1)
    assert other.exit_code == 2
    assert "with other options: limit: default, now 1" in other.stderr


def test_wrong_usage(accumulator: Model, clips: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((), "--input, --list: expected one of them"),
        (("-i", clips, "--list", tmp_path / "list.txt"), "--input, --list: expected one of them"),
        (("-i", clips, "--shard", "3/2"), "--shard: expected NUMBER/COUNT"),
        (("-i", clips, "--range", "x"), "--range: expected"),
        (("-i", clips, "--audio", "copy", "--fps", 9), "--fps and --audio copy"),
    ):
        result = call("map", accumulator(), *arguments, "-o", tmp_path / "out", "--workers", 1)
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("ending", ["ctrl-C", "SIGKILL"])
def test_ended_in_the_middle(accumulator: Model, clips: Path, tmp_path: Path, ending: str) -> None:
    """Ctrl-C reaches every process of the terminal. What is finished stays, and no process is left."""
    model, out, long = accumulator(), tmp_path / "out", clips / "long.npy"
    np.save(long, np.ones((300_000, 2, 2, 3), np.uint8))
    command = [*STEPCELL, "map", str(model), "-i", str(clips), "-o", str(out), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not list(out.glob(".stepcell-map/.work*/*/.long.*")):
            assert time.monotonic() < end, "it never came to the long clip"
            time.sleep(0.02)
        if ending == "ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        _, said = process.communicate(timeout=60)  # stderr ends with the last process that has it
    finally:
        process.kill()
    work = list(out.glob(".stepcell-map/.work*"))
    if ending == "ctrl-C":
        assert (process.returncode, work) == (128 + signal.SIGINT, [])
        assert "2 of 3 clips, 8 frames" in said
        assert "1 not run" in said
    else:
        assert (process.returncode, len(work)) == (-signal.SIGKILL, 1)
    assert "Traceback" not in said
    assert sorted(each.name for each in out.glob("*.npy")) == ["0.npy", "1.npy"]
    np.save(long, np.ones((2, 2, 2, 3), np.uint8))
    result = call("map", model, "-i", clips, "-o", out)
    assert "1 of 3 clips, 2 frames" in result.stderr
    assert not list(out.glob(".stepcell-map/.work*"))
