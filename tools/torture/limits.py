"""Too little of something: room on the disk, rights, descriptors, memory."""

from __future__ import annotations

import ctypes
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tools.torture.common import Inputs, Outcome, count, hidden, is_documented, last_lines, stepcell

PR_CAPBSET_DROP = 24  # of prctl: gives up a capability with the next execve
ANY_FILE = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
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
            frames = count(output)
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
    locked = folder / "locked"
    locked.mkdir(mode=0o555)
    commands = [*_writers(inputs, locked), ["run", inputs.model, "-i", inputs.clip, "-o", locked / "out.mkv"]]
    commands += [["run", inputs.model, "-i", inputs.clip, "-o", locked / "pictures", "--report", locked / "r.json"]]
    for arguments in commands:
        done = stepcell(*arguments, limits=_as_owner)
        outcome.tried += 1
        said = done.returncode != 0 and is_documented(done)
        outcome.require(said, f"{arguments[0]}: {last_lines(done)}")
        outcome.require(not list(locked.iterdir()), f"{arguments[0]}: wrote into it")
    outcome.seen = "each refused"
    return outcome


def _as_owner() -> None:
    """Give up what lets root write anywhere, so that the rights of the owner apply."""
    if os.getuid() == 0:
        library = ctypes.CDLL(None, use_errno=True)
        for capability in ANY_FILE:
            if library.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "prctl")


def few_descriptors(inputs: Inputs, folder: Path) -> Outcome:
    """A limit on open files, from too few for Python up to enough."""
    outcome = Outcome("few descriptors", IN_WORDS)
    folder.mkdir()
    succeeded = 0
    for descriptors in range(5, 29):
        output = folder / f"{descriptors}.mkv"
        arguments = ("run", inputs.model, "-i", inputs.clip, "-o", output, "--limit", 50)
        done = stepcell(*arguments, limits=_limit(resource.RLIMIT_NOFILE, descriptors))
        outcome.tried += 1
        succeeded += done.returncode == 0
        outcome.require(is_documented(done), f"{descriptors}: {last_lines(done)}")
        frames = count(output)
        outcome.require(frames == (50 if done.returncode == 0 else 0), f"{descriptors}: {frames} frames")
        outcome.require(not hidden(folder), f"{descriptors}: left behind: {hidden(folder)}")
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
        ["verify", inputs.model, "--steps", 8, "--warm-up", 0, "--shape", "x:1x3x32x32", "--report", folder / "v.html"],
    ]


def _limit(kind: int, value: int) -> Callable[[], None]:
    def set_limit() -> None:
        resource.setrlimit(kind, (value, value))

    return set_limit
