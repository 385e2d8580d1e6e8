"""How fast a server is beside a loop that steps as many streams in one process, and where the CPU time goes.

Rounds of both alternate while the server runs. CPU time per frame, of each process, is what other work on the machine
changes least.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.client import StreamClient
from stepcell.runtime.serving.wire import Wire
from tools.fleet.outcome import Outcome
from tools.fleet.servers import MODEL, Server, serving, write_repository

__all__ = ["throughput"]

_KINDS = 8  # different frames
_PATIENCE = 600  # seconds
SIZE = (144, 176)  # (height, width)
CASES = ((4, 1), (4, 2), (8, 1), (8, 2))  # streams, instances
COUNT = 60  # frames of each stream in a round


@dataclass
class Round:
    """Frames per second, and what a frame took: CPU milliseconds by process, and its share of a step."""

    speed: float
    cpu: dict[str, float]
    batch: float = 1.0


def throughput(model: Path, folder: Path, port: int, log: Path, rounds: int) -> Outcome:
    """All clients on the cores of the server."""
    outcome = Outcome(f"throughput, {SIZE[1]}x{SIZE[0]}", "reported; the last answers of each round are right")
    lines: list[str] = []
    for streams, instances in CASES:
        slots = streams // instances
        wait = 2 * _step_seconds(model, slots)  # as docs/fleet.md advises
        options = ("--slots", slots, "--instances", instances, "--batch-wait", f"{wait * 1e3:.0f}ms", "--idle", "1h")
        repository = write_repository(model, folder / f"throughput{len(lines)}", *options)
        with serving(repository, port, log) as server:
            try:
                pairs = _rounds(outcome, model, server, streams, rounds)
            except threading.BrokenBarrierError:
                outcome.broken.append(f"{streams} streams: a client ended with an error, which is above")
                break
        ratios = sorted(served.speed / alone.speed for served, alone in pairs)
        parts = {name: statistics.median(served.cpu[name] for served, _ in pairs) for name in pairs[0][0].cpu}
        alone = statistics.median(each.cpu["loop"] for _, each in pairs)
        lines.append(
            f"{streams} streams in {instances} x {slots} slots, waiting {wait * 1e3:.0f} ms: "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) of "
            f"{statistics.median(each.speed for _, each in pairs):.0f} frames/s, "
            f"{statistics.median(served.batch for served, _ in pairs):.1f} frames a step; CPU ms per frame: "
            + ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
            + f"; loop alone {alone:.2f}"
        )
        print(f"    {lines[-1]}", flush=True)
    outcome.seen = "; ".join(lines)
    return outcome


def _frames(seed: int) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*SIZE, 3), np.uint8) for _ in range(_KINDS)]


def _rounds(outcome: Outcome, model: Path, server: Server, streams: int, rounds: int) -> list[tuple[Round, Round]]:
    """Rounds of the server, each with one of a loop alone, of the same frames."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    all_here = context.Barrier(streams + 1)
    clients = [
        context.Process(target=_client, args=(server.url, seed, rounds, results, all_here), daemon=True)
        for seed in range(streams)
    ]
    for client in clients:
        client.start()
    found = []
    with Alone(model, streams) as alone:
        all_here.wait(_PATIENCE)  # their first frames are answered
        for _ in range(rounds):
            before, steps, started = server.cpu(), _steps(server), time.perf_counter()
            all_here.wait(_PATIENCE)
            all_here.wait(_PATIENCE)
            seconds, after, steps = time.perf_counter() - started, server.cpu(), _steps(server) - steps
            answered = [results.get(timeout=_PATIENCE) for _ in clients]
            by_itself, wanted = alone.round()
            wrong = sum(last != wanted[seed] for seed, _, last in answered)
            outcome.require(wrong == 0, f"{streams} streams: {wrong} wrong answers")
            count = COUNT * streams
            cpu = {name: (after[name] - before[name]) / count * 1e3 for name in after}
            cpu["clients"] = sum(used for _, used, _ in answered) / count * 1e3
            found.append((Round(count / seconds, cpu, count / max(1, steps)), by_itself))
    for client in clients:
        client.join(10)
    return found


def _client(url: str, seed: int, rounds: int, results: Any, all_here: Any) -> None:
    frames = _frames(seed)
    try:
        with StreamClient(url, MODEL) as stream:
            stream.step(x=frames[0])
            all_here.wait(_PATIENCE)
            for _ in range(rounds):
                all_here.wait(_PATIENCE)
                before = time.process_time()
                for number in range(COUNT):
                    answer = stream.step(x=frames[number % _KINDS])["y"]
                used = time.process_time() - before
                all_here.wait(_PATIENCE)
                results.put((seed, used, answer.tobytes()))
    except Exception:
        all_here.abort()  # nobody waits for this one
        raise


def _step_seconds(model: Path, slots: int) -> float:
    """Of one step; the median of ten."""
    with Alone(model, slots) as alone:
        return statistics.median(alone.step_seconds() for _ in range(10))


def _steps(server: Server) -> int:
    """Batches that were stepped so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(round(float(line.split()[-1])) for line in lines if line.startswith("nv_inference_exec_count{"))


class Alone:
    """One process that steps as many slots."""

    def __init__(self, model: Path, slots: int) -> None:
        self._slots = slots
        self._loop = StepLoop.open(model, slots=slots, backend="onnxruntime")
        self._wire = Wire(self._loop.contract, slots, pixels=True)
        self._held = [self._loop.attach() for _ in range(slots)]
        self._frames = [_frames(seed) for seed in range(slots)]
        self._step(0)

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.close()

    def round(self) -> tuple[Round, list[bytes]]:
        """A round, and its last answers."""
        started, before = time.perf_counter(), time.process_time()
        for number in range(COUNT):
            answers = self._step(number)
        seconds, used, count = time.perf_counter() - started, time.process_time() - before, COUNT * self._slots
        return Round(count / seconds, {"loop": used / count * 1e3}), [answer.tobytes() for answer in answers]

    def step_seconds(self) -> float:
        """Of one step."""
        started = time.perf_counter()
        self._step(0)
        return time.perf_counter() - started

    def _step(self, number: int) -> list[NDArray[Any]]:
        frames = [each[number % _KINDS][None] for each in self._frames]
        outputs = self._loop.step_slots(
            {slot: self._wire.to_model(slot.index, {"x": frames[slot.index]}) for slot in self._held}
        )
        return [self._wire.to_client(slot.index, outputs[slot])["y"][0] for slot in self._held]
