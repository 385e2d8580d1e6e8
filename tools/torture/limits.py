"""Too little of something: room on the disk, rights, descriptors, memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stepcell import open_source
from tools.torture.common import Inputs, Outcome, hidden, is_documented, last_lines, stepcell

NOBODY = 65534  # user and group without rights, for a folder that root could write to
IN_WORDS = "an error in words with its exit code, never a traceback; no part of a file under a final name"


def full_disk(inputs: Inputs, folder: Path) -> Outcome:
    """A limit on the size of each file, which a write meets as it meets a full disk."""
    outcome = Outcome("full disk", IN_WORDS + "; a recording keeps its first frames, the report says how many")
    folder.mkdir()
    least = 0
    for number, kib in enumerate((0, 1, 2, 4, 16, 64, 256, 1024)):
        for suffix in (".npy", ".mkv", ".mp4", ""):
            place = folder / f"{number}{suffix or 'pictures'}"
            place.mkdir()
            output, report = place / f"out{suffix}", place / "run.json"
            files = ("-o", output, "--report", report, "--snapshot", place / "s.safetensors", "--json")
            done = stepcell(
                "run", inputs.model, "-i", inputs.clip, *files, limits=_limit(resource.RLIMIT_FSIZE, kib << 10)
            )
            outcome.tried += 1
            outcome.require(is_documented(done), f"{kib} KiB, {output.name}: {last_lines(done)}")
            outcome.require(not hidden(place), f"{kib} KiB, {output.name}: left behind: {hidden(place)}")
            frames = _count(output)
            if report.exists():
                written = json.loads(report.read_text())["written"]
                outcome.require(written == frames, f"{kib} KiB, {output.name}: {frames} frames, reported {written}")
            least += 0 < frames < len(np.load(inputs.whole, mmap_mode="r"))
    for kib in (0, 1, 2, 4):
        for arguments in _writers(inputs, folder):
            done = stepcell(*arguments, limits=_limit(resource.RLIMIT_FSIZE, kib << 10))
            outcome.tried += 1
            outcome.require(is_documented(done), f"{kib} KiB, {arguments[0]}: {last_lines(done)}")
            outcome.require(not hidden(folder), f"{kib} KiB, {arguments[0]}: left behind: {hidden(folder)}")
    outcome.seen = f"{least} recordings kept a part"
    return outcome


def read_only(inputs: Inputs, folder: Path) -> Outcome:
    """Outputs into a folder without the right to write."""
    outcome = Outcome("read-only folder", IN_WORDS)
    folder.mkdir()
    mine = folder / "inputs"
    shutil.copytree(inputs.model.parent, mine, ignore=shutil.ignore_patterns("[!m]*.onnx", "whole.npy"))
    locked = folder / "locked"
    locked.mkdir(mode=0o555)

    def drop_rights() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    for path in (folder, *folder.parents):  # so that the child reaches its inputs
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
        if path.name.startswith("stepcell-torture"):
            break
    local = Inputs(
        *(mine / path.name for path in (inputs.checkpoint, inputs.model, inputs.model, inputs.clip, inputs.clip))
    )
    for path in mine.iterdir():
        path.chmod(0o644)
    commands = [*_writers(local, locked), ["run", local.model, "-i", local.clip, "-o", locked / "out.mkv"]]
    commands += [["run", local.model, "-i", local.clip, "-o", locked / "pictures", "--report", locked / "r.json"]]
    for arguments in commands:
        done = stepcell(*arguments, limits=drop_rights)
        outcome.tried += 1
        said = done.returncode != 0 and is_documented(done)
        outcome.require(said, f"{arguments[0]}: {last_lines(done)}")
        outcome.require(not list(locked.iterdir()), f"{arguments[0]}: wrote into it")
    outcome.seen = "each refused"
    return outcome


def few_descriptors(inputs: Inputs, folder: Path) -> Outcome:
    """A limit on open files, from too few for Python up to enough."""
    outcome = Outcome("few descriptors", IN_WORDS)
    folder.mkdir()
    succeeded = 0
    for count in range(10, 42):
        output = folder / f"{count}.mkv"
        arguments = ("run", inputs.model, "-i", inputs.clip, "-o", output, "--limit", 50)
        done = stepcell(*arguments, limits=_limit(resource.RLIMIT_NOFILE, count))
        outcome.tried += 1
        succeeded += done.returncode == 0
        outcome.require(is_documented(done), f"{count}: {last_lines(done)}")
        outcome.require(_count(output) == (50 if done.returncode == 0 else 0), f"{count}: {_count(output)} frames")
        outcome.require(not hidden(folder), f"{count}: left behind: {hidden(folder)}")
    outcome.seen = f"{succeeded} of {outcome.tried} had enough"
    return outcome


def little_memory(inputs: Inputs, folder: Path) -> Outcome:
    """A limit on the address space, from what Python and the libraries need upwards."""
    outcome = Outcome(
        "little memory", "exit 6 with what was asked for, never a traceback; no part of a file under a final name"
    )
    folder.mkdir()
    codes: dict[int, int] = {}
    enough = _enough_memory(inputs)
    big = folder / "big.npy"
    np.save(big, np.zeros((3, 1024, 1024, 3), np.uint8))
    for mib in range(enough, enough + 640, 32):
        output = folder / f"{mib}.npy"
        done = stepcell(
            "run", inputs.model, "--threads", 1, "-i", big, "-o", output, limits=_limit(resource.RLIMIT_AS, mib << 20)
        )
        outcome.tried += 1
        codes[done.returncode] = codes.get(done.returncode, 0) + 1
        fine = is_documented(done) and done.returncode in (0, 6)
        outcome.require(fine, f"{mib} MiB: {last_lines(done)}")
        outcome.require(not hidden(folder), f"{mib} MiB: left behind: {hidden(folder)}")
    outcome.seen = ", ".join(f"{times} times exit {code}" for code, times in sorted(codes.items()))
    return outcome


def _enough_memory(inputs: Inputs) -> int:
    """MiB of address space with which a run of small frames succeeds: Python and the libraries are loaded."""
    for mib in range(256, 8192, 128):
        arguments = ("run", inputs.model, "--threads", 1, "-i", inputs.clip, "--limit", 2)
        if stepcell(*arguments, limits=_limit(resource.RLIMIT_AS, mib << 20)).returncode == 0:
            return mib
    raise RuntimeError("no run succeeded in 8 GiB of address space")


def _writers(inputs: Inputs, folder: Path) -> list[list[object]]:
    """Commands that write a file into a folder."""
    return [
        ["export", inputs.checkpoint, "--precision", "float32", "-o", folder / "m.onnx"],
        ["build", inputs.model, "-o", folder / "m.engine", "--optShapes", "x:1x3x32x32"],
        ["verify", inputs.model, "--steps", 8, "--size", "32x32", "--report", folder / "v.html"],
    ]


def _limit(kind: int, value: int) -> Callable[[], None]:
    def set_limit() -> None:
        resource.setrlimit(kind, (value, value))

    return set_limit


def _count(path: Path) -> int:
    """Number of frames of an output; 0: there is none."""
    if not path.exists():
        return 0
    return len(np.load(path)) if path.suffix == ".npy" else sum(1 for _ in open_source(str(path)))
