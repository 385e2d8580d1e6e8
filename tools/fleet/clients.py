"""Client processes: each sends the frames of a stream, and notes a digest of every answer."""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event, Semaphore
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.client import NotAnswered, RefusedFrame, StreamClient
from stepcell.runtime.serving.wire import Wire

__all__ = ["Clients", "Stream", "digest", "expected", "frame"]

SIZE = (48, 64)  # small: these are tests of streams, not of the model


def frame(seed: int, number: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """A frame of a stream: pixels (H, W, 3)."""
    return np.random.default_rng((seed, number)).integers(0, 256, (*size, 3), np.uint8)


def digest(array: NDArray[Any]) -> str:
    """Of the bytes of an answer."""
    return hashlib.sha1(array.tobytes()).hexdigest()


def expected(model: Path, seed: int, count: int) -> list[str]:
    """Digests of the answers of a loop that steps one stream alone."""
    with StepLoop.open(model, slots=1, threads=1, backend="onnxruntime") as loop:
        wire, slot = Wire(loop.contract, 1, pixels=True), loop.attach()
        found = []
        for number in range(count):
            outputs = loop.step_slots({slot: wire.to_model(0, {"x": frame(seed, number)[None]})})
            found.append(digest(wire.to_client(0, outputs[slot])["y"][0]))
    return found


@dataclass
class Stream:
    """What a client saw: digests of answers by number, errors and events by name, and for how long it had no answer."""

    seed: int
    answers: list[str] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    longest: float = 0.0
    seconds: float = 0.0

    def wrong(self, wanted: list[str]) -> int:
        """Answers that are not those of a loop of its own."""
        return sum(one != other for one, other in zip(self.answers, wanted, strict=False))


class Clients:
    """Processes of clients, each with a stream of its own; a client whose state is lost ends with that error.

    Args:
        urls: of the servers, used in turn.
        count: number of clients.
        frames: of each; they stop earlier once `stop` was called.
        options: of `StreamClient`.
    """

    def __init__(self, urls: list[str], model: str, count: int, frames: int, *, first: int = 0, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._results: Any = context.Queue()
        self._stopping: Event = context.Event()
        self._begun = context.Semaphore(0)
        self._processes = [
            context.Process(
                target=_client,
                args=(urls[seed % len(urls)], model, seed, frames, options, self._results, self._begun, self._stopping),
                daemon=True,
            )
            for seed in range(first, first + count)
        ]
        for process in self._processes:
            process.start()

    def wait(self, seconds: float = 120) -> None:
        """Until each has an answer, which takes long on a busy machine."""
        for _ in self._processes:
            self._begun.acquire(timeout=seconds)

    def stop(self) -> None:
        """Let them end with their current frame."""
        self._stopping.set()

    def results(self, seconds: float = 600) -> list[Stream]:
        """Wait for them."""
        found = [self._results.get(timeout=seconds) for _ in self._processes]
        for process in self._processes:
            process.join(10)
        return sorted(found, key=lambda stream: int(stream.seed))


def _client(
    url: str,
    model: str,
    seed: int,
    frames: int,
    options: dict[str, Any],
    results: Any,
    begun: Semaphore,
    stopping: Event,
) -> None:
    seen, errors, events = Stream(seed), Counter[str](), Counter[str]()
    started = last = time.monotonic()
    try:
        with StreamClient(url, model, on_event=lambda event: events.update([event.kind]), **options) as stream:
            for number in range(frames):
                if stopping.is_set():
                    break
                seen.answers.append(digest(stream.step(x=frame(seed, number))["y"]))
                if number == 0:
                    begun.release()
                now = time.monotonic()
                seen.longest, last = max(seen.longest, now - last), now
    except RefusedFrame as refusal:
        errors[refusal.name] += 1
    except NotAnswered as error:
        errors[f"NotAnswered: {error.message}"] += 1
    except Exception as error:
        errors[f"{type(error).__name__}: {error}"] += 1
    seen.errors, seen.events, seen.seconds = dict(errors), dict(events), time.monotonic() - started
    results.put(seen)
