"""SIGKILL at random moments: no file is lost, no half file has a final name, and a resumed run goes on bit by bit."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tools.torture.common import (
    ENVIRONMENT,
    Inputs,
    Outcome,
    command,
    count,
    hidden,
    last_lines,
    require_success,
    stepcell,
)

SNAPSHOT_EVERY = 7
OLDER = 20  # frames of the file that is there before
POLL_SECONDS = 0.0005


def kills(inputs: Inputs, folder: Path, total: int, rng: random.Random) -> Iterator[Outcome]:
    """`total` kills: three in five of `run`, the others of the commands that write one file."""
    folder.mkdir()
    killer = _Killer(inputs, rng)
    for suffix in (".npy", ".mkv", ""):
        yield _runs(killer, folder / f"run{suffix or '-folder'}", suffix, total // 5)
    rest = total - 3 * (total // 5)
    for name, share in (("export", rest // 4), ("build", rest // 2), ("snapshots", rest - rest // 4 - rest // 2)):
        yield _writers(killer, folder / name, name, share)


class _Killer:
    """Kills one command again and again: half of the times anywhere, half while it writes."""

    def __init__(self, inputs: Inputs, rng: random.Random) -> None:
        self.inputs, self._rng = inputs, rng

    def repeat(
        self,
        outcome: Outcome,
        arguments: list[object],
        place: Path,
        times: int,
        prepare: Callable[[int], None],
        check: Callable[[int], None],
    ) -> int:
        """Kill a command until it was running `times` times; how often it had ended before, which counts as no kill.

        Args:
            place: folder in which it writes.
            prepare: makes the files before a kill, by its number; 0 before the run that is timed.
            check: looks at the files after a kill.
        """
        before, number = self._hashes(), 0
        prepare(0)
        begin, end = self._time(arguments, place)
        while outcome.tried < times:
            number += 1
            prepare(number)
            ended = self._kill(arguments, place, begin, end)
            if ended is None:
                outcome.tried += 1
            else:  # the first run may have been slower, as one that fills a cache is
                end = max(begin, min(end, ended))
            check(number)
            outcome.require(self._hashes() == before, f"{number}: an input has changed")
        return number - times

    def _time(self, arguments: list[object], place: Path) -> tuple[float, float]:
        """Seconds until the first temporary file, and until the end."""
        started = time.monotonic()
        with self._start(arguments) as child:
            self._wait_for_writing(child, place)
            begin = time.monotonic() - started
            if child.wait():
                raise RuntimeError(f"{arguments} failed with {child.returncode}")
        return begin, time.monotonic() - started

    def _kill(self, arguments: list[object], place: Path, begin: float, end: float) -> float | None:
        """None; or the seconds after which the command had ended by itself."""
        started = time.monotonic()
        with self._start(arguments) as child:
            moment = self._rng.uniform(0, end)
            if self._rng.random() < 0.5:
                self._wait_for_writing(child, place)
                moment = self._rng.uniform(0, end - begin)
            try:
                child.wait(moment)
            except subprocess.TimeoutExpired:
                child.kill()
                return None
            return time.monotonic() - started

    def _start(self, arguments: list[object]) -> subprocess.Popen[bytes]:
        words = command(*arguments)
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)

    def _wait_for_writing(self, child: subprocess.Popen[bytes], place: Path) -> None:
        known = set(hidden(place))
        while child.poll() is None and not set(hidden(place)) - known:
            time.sleep(POLL_SECONDS)

    def _hashes(self) -> list[str]:
        paths = (self.inputs.checkpoint, self.inputs.model, self.inputs.clip)
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def _runs(killer: _Killer, folder: Path, suffix: str, times: int) -> Outcome:
    """Runs with snapshots, killed once and resumed into a second output; over an older file of this program."""
    outcome = Outcome(
        f"kill run to {suffix or 'a folder of pictures'}",
        "inputs untouched; the output is the older file or a whole new one; --resume continues bit by bit, the frames "
        "before it are in the output or in a recovered one; no hidden file left",
    )
    place, older = folder / "place", folder / f"older{suffix}"
    folder.mkdir()
    whole = np.load(killer.inputs.whole)
    output, rest, snapshot = place / f"out{suffix}", place / "rest.npy", place / "state.safetensors"
    run = ["run", killer.inputs.model, "--threads", 1, "-i", killer.inputs.clip]
    if suffix:
        require_success(stepcell(*run, "-o", older, "--limit", OLDER))
    run += ["--resume", "--snapshot-every", SNAPSHOT_EVERY, "--snapshot", snapshot]
    resumed = recovered = 0

    def prepare(_: int) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if suffix:  # a folder of pictures must be new
            shutil.copyfile(older, output)

    def check(number: int) -> None:
        nonlocal resumed, recovered
        frames = count(output)
        kept = (OLDER if suffix else 0, len(whole))
        outcome.require(frames in kept, f"{number}: the output has {frames} frames")
        done = stepcell(*run, "-o", rest)
        outcome.require(done.returncode == 0, f"{number}: resumed run: {last_lines(done)}")
        start = re.search(r"resuming at frame (\d+)", " ".join(done.stderr.split()))
        first = int(start[1]) if start else 0
        resumed += first > 0
        found = np.load(rest) if rest.exists() else whole[:0]
        same = np.array_equal(found, whole[first:])
        outcome.require(same, f"{number}: resumed at {first}, other frames than uninterrupted")
        name = rf"out\.[0-9a-f]{{8}}{re.escape(suffix)}"
        pieces = [count(path) for path in place.iterdir() if re.fullmatch(name, path.name)]
        recovered += len(pieces)
        reached = max([*pieces, frames if frames == len(whole) else 0])
        outcome.require(reached >= first, f"{number}: resumed at {first}, but {reached} frames are kept")
        outcome.require(not hidden(place), f"{number}: left behind: {hidden(place)}")

    ended = killer.repeat(outcome, [*run, "-o", output], place, times, prepare, check)
    outcome.seen = f"{ended} more had ended before, {resumed} resumed from a snapshot, {recovered} outputs recovered"
    return outcome


def _writers(killer: _Killer, folder: Path, name: str, times: int) -> Outcome:
    """Commands that write files of one piece, over older ones."""
    outcome = Outcome(
        f"kill {name}",
        "inputs untouched; every output is the older file, byte by byte, or a new one that passes its checks; "
        "the next start removes what is left",
    )
    folder.mkdir()
    inputs, model, engine = killer.inputs, folder / "model.onnx", folder / "model.engine"
    snapshot = folder / "s.safetensors"
    run = ["run", inputs.model, "--threads", 1, "-i", inputs.clip, "--snapshot", snapshot]
    shapes = ("-o", engine, "--optShapes", "x:1x3x32x32")
    # the command, the one that makes older files, the one that takes a whole file only, and the outputs
    commands: dict[str, tuple[list[object], list[object], list[object], list[Path]]] = {
        "export": (
            ["export", inputs.checkpoint, "--precision", "float32", "-o", model],
            ["export", inputs.checkpoint, "-o", model],
            ["inspect", model],
            [model],
        ),
        "build": (
            ["build", inputs.model, *shapes],
            ["build", inputs.other_model, *shapes],
            ["inspect", engine],
            [engine, engine.with_name("model.engine.json")],
        ),
        "snapshots": (
            [*run, "--limit", 50, "--snapshot-every", 2],
            [*run, "--limit", 20],
            [*run, "--resume", "--limit", 51],
            [snapshot],
        ),
    }
    arguments, makes_older, reads, outputs = commands[name]
    require_success(stepcell(*makes_older))
    old = {path: path.read_bytes() for path in outputs}
    replaced = 0

    def prepare(_: int) -> None:
        for path in outputs:
            path.write_bytes(old[path])

    def check(number: int) -> None:
        nonlocal replaced
        if [path.read_bytes() for path in outputs] != list(old.values()):
            replaced += 1
            done = stepcell(*reads)
            whole = done.returncode == 0
            outcome.require(whole, f"{number}: {outputs[0].name} is neither older nor whole: {last_lines(done)}")

    ended = killer.repeat(outcome, arguments, folder, times, prepare, check)
    require_success(stepcell(*arguments))
    outcome.require(not hidden(folder), f"left behind: {hidden(folder)}")
    outcome.seen = f"{ended} more had ended before, {replaced} outputs were in place"
    return outcome
