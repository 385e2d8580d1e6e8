"""SIGKILL at random moments: no file is lost, no half file has a final name, and a resumed run goes on bit by bit."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stepcell import open_source
from tools.torture.common import ENVIRONMENT, Inputs, Outcome, command, hidden, last_lines, require_success, stepcell

SNAPSHOT_EVERY = 7


def kills(inputs: Inputs, folder: Path, count: int, rng: random.Random) -> list[Outcome]:
    """`count` kills: three in five of `run`, the others of the commands that write one file."""
    folder.mkdir()
    outcomes = []
    for suffix in (".npy", ".mkv", ""):
        outcomes.append(_killed_runs(inputs, folder / f"run{suffix or '-folder'}", suffix, count // 5, rng))
    rest = count - 3 * (count // 5)
    for name, share in (("export", rest // 4), ("build", rest // 2), ("snapshots", rest - rest // 4 - rest // 2)):
        outcomes.append(_killed_writers(inputs, folder / name, name, share, rng))
    return outcomes


def _kill(arguments: list[str], duration: float, rng: random.Random) -> bool:
    """Start a command and kill it at a random moment; whether it was still running."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT) as child:
        try:
            child.wait(rng.uniform(0, duration))
        except subprocess.TimeoutExpired:
            child.kill()
            return True
    return False


def _timed(action: Callable[[], object]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


def _killed_runs(inputs: Inputs, folder: Path, suffix: str, count: int, rng: random.Random) -> Outcome:
    """Runs with snapshots over an older output of this program, killed once and resumed into a second output."""
    outcome = Outcome(
        f"kill run to {suffix or 'a folder of pictures'}",
        "inputs untouched; the older output whole or replaced by a whole one; --resume continues bit by bit; "
        "frames of the killed run recovered; no hidden file left",
    )
    folder.mkdir()
    whole = np.load(inputs.whole)
    before = _hashes(inputs)
    arguments = ["run", inputs.model, "--threads", 1, "-i", inputs.clip, "--resume", "--snapshot-every", SNAPSHOT_EVERY]
    duration = _timed(
        lambda: require_success(
            stepcell(*arguments, "-o", folder / f"timed{suffix}", "--snapshot", folder / "timed.safetensors")
        )
    )
    killed = resumed = recovered = 0
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        output, snapshot = place / f"out{suffix}", place / "state.safetensors"
        _copy(folder / f"timed{suffix}", output)
        killed += _kill(command(*arguments, "-o", output, "--snapshot", snapshot), duration, rng)
        outcome.require(_count(output) == len(whole), f"{number}: the older output has {_count(output)} frames")
        rest = place / "rest.npy"
        done = stepcell(*arguments, "-o", rest, "--snapshot", snapshot)
        outcome.require(done.returncode == 0, f"{number}: resumed run: {last_lines(done)}")
        start = re.search(r"resuming at frame (\d+)", " ".join(done.stderr.split()))
        first = int(start[1]) if start else 0
        resumed += first > 0
        found = np.load(rest) if rest.exists() else whole[:0]
        outcome.require(
            np.array_equal(found, whole[first:]), f"{number}: resumed at {first}, other frames than uninterrupted"
        )
        pieces = [
            path for path in place.iterdir() if re.fullmatch(rf"out\.[0-9a-f]{{8}}{re.escape(suffix)}", path.name)
        ]
        recovered += len(pieces)
        outcome.require(
            all(_count(piece) <= len(whole) for piece in pieces), f"{number}: a recovered file cannot be read"
        )
        outcome.require(not hidden(place), f"{number}: left behind: {hidden(place)}")
        outcome.require(_hashes(inputs) == before, f"{number}: an input has changed")
        shutil.rmtree(place)
    outcome.tried = count
    outcome.seen = f"{killed} killed while running, {resumed} resumed from a snapshot, {recovered} outputs recovered"
    return outcome


def _killed_writers(inputs: Inputs, folder: Path, name: str, count: int, rng: random.Random) -> Outcome:
    """Commands that write files of one piece, over older ones."""
    outcome = Outcome(
        f"kill {name}",
        "inputs untouched; every output is the older file, byte by byte, or a new one that passes its checks; "
        "the next start removes what is left",
    )
    folder.mkdir()
    shutil.copyfile(inputs.other_model, folder / "older.onnx")
    engine, shapes = folder / "model.engine", ("--optShapes", "x:1x3x32x32")
    written: dict[str, tuple[list[object], list[Path]]] = {
        "export": (
            ["export", inputs.checkpoint, "--precision", "float32", "-o", folder / "model.onnx"],
            [folder / "model.onnx"],
        ),
        "build": (["build", inputs.model, "-o", engine, *shapes], [engine, engine.with_name("model.engine.json")]),
        "snapshots": (
            [
                "run",
                inputs.model,
                "--threads",
                1,
                "-i",
                inputs.clip,
                "--snapshot",
                folder / "s.safetensors",
                "--report",
                folder / "r.json",
                "--limit",
                50,
            ],
            [folder / "s.safetensors"],
        ),
    }
    arguments, outputs = written[name]
    older = {
        "export": ["export", inputs.checkpoint, "-o", folder / "model.onnx"],
        "build": ["build", inputs.other_model, "-o", engine, *shapes],
    }
    require_success(stepcell(*older.get(name, [*arguments, "--limit", 20])))
    old = {path: path.read_bytes() for path in outputs}
    duration = _timed(lambda: require_success(stepcell(*arguments)))
    before, killed, replaced = _hashes(inputs), 0, 0
    for number in range(count):
        for path in outputs:
            path.write_bytes(old[path])
        killed += _kill(command(*arguments), duration, rng)
        found = [path.read_bytes() for path in outputs]
        if found != list(old.values()):
            done = stepcell(*_reader(name, arguments, outputs[0]))
            outcome.require(
                done.returncode == 0, f"{number}: {outputs[0].name} is neither older nor whole: {last_lines(done)}"
            )
        replaced += found != list(old.values())
        outcome.require(_hashes(inputs) == before, f"{number}: an input has changed")
    require_success(stepcell(*arguments))
    outcome.require(not hidden(folder), f"left behind: {hidden(folder)}")
    outcome.tried = count
    outcome.seen = f"{killed} killed while running, {replaced} after the outputs were in place"
    return outcome


def _reader(name: str, arguments: list[object], output: Path) -> list[object]:
    """The command that takes an output as a whole file, or refuses it: contracts, engines and snapshots are sealed."""
    return [*arguments, "--resume", "--limit", 51] if name == "snapshots" else ["inspect", output]


def _hashes(inputs: Inputs) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in (inputs.checkpoint, inputs.model, inputs.clip)]


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)


def _count(path: Path) -> int:
    """Number of frames that can be read from an output."""
    return len(np.load(path)) if path.suffix == ".npy" else sum(1 for _ in open_source(str(path)))
