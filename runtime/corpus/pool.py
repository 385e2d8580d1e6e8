"""Runs clips in workers, each with one loop and one clip at a time; a worker that ends costs only its clip.

What is the same wherever the workers are: the order, what is run once more, and what is logged. `local_pool` has
processes of this machine, `ray_pool` actors of a cluster.
"""

from __future__ import annotations

import abc
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from stepcell.errors import DeviceError
from stepcell.runtime.corpus.clip_runner import ClipResult
from stepcell.runtime.corpus.job import Clip, Job
from stepcell.runtime.streams.run_control import RunControl

__all__ = ["Pool", "Worker"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


class Worker(abc.ABC):
    """A worker as its pool sees it: the other end of a `ClipWorker`.

    Args:
        work: its folder for unfinished outputs.

    Attributes:
        clip: that it runs; None: it has none.
        frames: of that clip, stepped so far.
        ready: it has opened the model.
        lost: it has ended, or cannot be reached.
    """

    def __init__(self, work: Path) -> None:
        self.clip: Clip | None = None
        self.frames = 0
        self.ready = self.lost = False
        self._work = work

    def give(self, clip: Clip) -> None:
        """Let it run a clip; after it is ready and without a clip."""
        self.clip, self.frames = clip, 0
        self._send(clip)

    def receive(self) -> tuple[str, Any]:
        """Take the next message, which must have come; ("lost", None) if it has ended."""
        message = self._take()
        if message is None:
            self.lost = True
            return "lost", None
        kind, value = message
        if kind == "frames":
            self.frames = value
        elif kind == "ready":
            self.ready = True
        elif kind == "done":
            self.clip, self.frames = None, 0
        return kind, value

    def end(self) -> None:
        """Wait for its end, and end it if it takes long; delete what it left."""
        self._end()
        shutil.rmtree(self._work, ignore_errors=True)

    @property
    @abc.abstractmethod
    def ending(self) -> str:
        """How it ended, for messages; after `end`."""

    @abc.abstractmethod
    def leave(self) -> None:
        """Let it end if it waits for a clip, else end it."""

    @abc.abstractmethod
    def _send(self, clip: Clip) -> None:
        """Give it a clip, also if it has ended, as the next `receive` finds."""

    @abc.abstractmethod
    def _take(self) -> tuple[str, Any] | None:
        """The next message; None: it has ended."""

    @abc.abstractmethod
    def _end(self) -> None:
        """Wait for its end, and end it if it takes long."""


_W = TypeVar("_W", bound=Worker)


class Pool(abc.ABC, Generic[_W]):
    """Workers that are started as needed.

    Args:
        job: what each runs.
        workers: most at a time.
        work: an empty folder for unfinished outputs.

    Attributes:
        workers: most at a time.
        running: frames of the clips that are being run.
    """

    max_unopened = 0  # workers, one after another, that may end while they open the model

    def __init__(self, job: Job, workers: int, work: Path) -> None:
        self.workers = workers
        self._job, self._work = job, work
        self._alive: list[_W] = []
        self._started = self._unopened = 0
        self._said: set[str] = set()

    @property
    def running(self) -> int:
        return sum(worker.frames for worker in self._alive)

    def run(
        self,
        clips: Sequence[Clip],
        done: Callable[[Clip, ClipResult], None],
        control: RunControl,
        tick: Callable[[], None],
    ) -> None:
        """Run clips until all are done or a stop is requested.

        A clip whose worker ends is run once more after the others, and fails if that happens again.

        Args:
            clips: in this order.
            done: called with each clip that was finished or failed.
            control: a stop ends the workers; the outputs of their clips are dropped.
            tick: called a few times a second.

        Raises:
            StepcellError: the model cannot be opened.
        """
        queue, retried = deque(clips), set[Clip]()
        try:
            while not control.stopping and (queue or any(worker.clip for worker in self._alive)):
                waiting = sum(worker.clip is None for worker in self._alive)
                while len(self._alive) < self.workers and waiting < len(queue):
                    self._add()
                    waiting += 1
                for worker in self._answering(self._alive, _POLL_SECONDS):
                    clip = worker.clip
                    result = self._receive(worker)
                    if result is None and worker.lost:
                        self._alive.remove(worker)
                        worker.end()
                        if clip is None:
                            self._lost_idle(worker)
                        elif clip in retried:
                            result = ClipResult(error=f"{clip.source}: its worker {worker.ending}, twice", exit_code=6)
                        else:
                            logger.warning(
                                f"{clip.source}: its worker {worker.ending}; it is run again after the others"
                            )
                            retried.add(clip)
                            queue.append(clip)
                    if result is not None and clip is not None:
                        done(clip, result)
                for worker in self._alive:
                    if worker.ready and worker.clip is None and queue:
                        worker.give(queue.popleft())
                tick()
        finally:
            for worker in self._alive:
                worker.leave()
            for worker in self._alive:
                worker.end()
            self._alive.clear()

    @abc.abstractmethod
    def _start(self, work: Path) -> _W:
        """Start a worker with an empty folder for its unfinished outputs."""

    @abc.abstractmethod
    def _answering(self, workers: Sequence[_W], seconds: float) -> Iterable[_W]:
        """Wait for a message or the end of a worker; those that have one."""

    def _add(self) -> None:
        self._started += 1
        work = self._work / f"{self._started}"
        work.mkdir()
        self._alive.append(self._start(work))

    def _lost_idle(self, worker: _W) -> None:
        if worker.ready:
            return
        self._unopened += 1
        what = f"{self._job.model}: a worker {worker.ending} while it opened the model"
        if self._unopened > self.max_unopened:
            raise DeviceError(what)
        logger.warning(f"{what}; another is started")

    def _receive(self, worker: _W) -> ClipResult | None:
        """Take one message; a result, if it is one."""
        kind, value = worker.receive()
        if kind == "log":
            self._log(*value)
        elif kind == "unopened":
            raise value
        elif kind == "ready":
            self._unopened = 0
        return value if kind == "done" else None

    def _log(self, level: int, text: str, clip: str) -> None:
        """Log a warning of a worker with the name of its clip, and what is no warning once for all clips."""
        of_clip = clip != "" and clip in text
        if level >= logging.WARNING:
            logger.log(level, text if of_clip or not clip else f"{clip}: {text}")
        elif (alike := text.replace(clip, "")) not in self._said:
            self._said.add(alike)
            logger.log(level, f"{text} (said once for all clips)" if of_clip else text)
