"""Runs clips in processes of this machine, each with one loop and one clip at a time.

`concurrent.futures` gives up all its work when one process dies; here a process that is killed costs only its clip.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.resource_tracker as resource_tracker
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from stepcell.errors import DeviceError, StepcellError
from stepcell.runtime.corpus.clip_runner import ClipResult, ClipRunner
from stepcell.runtime.corpus.job import Clip, Job
from stepcell.runtime.media.source import display_name
from stepcell.runtime.streams.run_control import RunControl

__all__ = ["LocalPool"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_PROGRESS_SECONDS = 0.2  # between two counts of frames of one clip
_END_SECONDS = 5.0  # to wait for a process that is asked to end


class LocalPool:
    """A pool of processes that are started as needed.

    Args:
        job: what each runs.
        workers: most processes at a time.
        work: an empty folder for unfinished outputs.

    Attributes:
        running: frames of the clips that are being run.
    """

    def __init__(self, job: Job, workers: int, work: Path) -> None:
        self._job, self._workers, self._work = job, workers, work
        self._processes: list[_Process] = []
        self._started = 0
        self._said: set[str] = set()

    @property
    def running(self) -> int:
        return sum(process.frames for process in self._processes)

    def run(
        self,
        clips: Sequence[Clip],
        done: Callable[[Clip, ClipResult], None],
        control: RunControl,
        tick: Callable[[], None],
    ) -> None:
        """Run clips until all are done or a stop is requested.

        A clip whose process ends is run once more after the others, and fails if that happens again.

        Args:
            clips: in this order.
            done: called with each clip that was finished or failed.
            control: a stop ends the processes; the outputs of their clips are dropped.
            tick: called a few times a second.

        Raises:
            StepcellError: the model cannot be opened.
        """
        queue, retried = deque(clips), set[Clip]()
        try:
            while not control.stopping and (queue or any(process.clip for process in self._processes)):
                waiting = sum(process.clip is None for process in self._processes)
                while len(self._processes) < self._workers and waiting < len(queue):
                    self._start()
                    waiting += 1
                for process in self._answering():
                    clip = process.clip
                    result = self._receive(process)
                    if result is None and process.lost:
                        self._remove(process)
                        if clip is None:
                            raise DeviceError(f"{self._job.model}: a worker {process.ending} while it opened the model")
                        if clip in retried:
                            result = ClipResult(error=f"{clip.source}: its worker {process.ending}, twice", exit_code=6)
                        else:
                            logger.warning(
                                f"{clip.source}: its worker {process.ending}; it is run again after the others"
                            )
                            retried.add(clip)
                            queue.append(clip)
                    if result is not None and clip is not None:
                        done(clip, result)
                for process in self._processes:
                    if process.ready and process.clip is None and queue:
                        process.give(queue.popleft())
                tick()
        finally:
            self._end()

    def _answering(self) -> list[_Process]:
        ready = wait([process.connection for process in self._processes], _POLL_SECONDS)
        return [process for process in self._processes if process.connection in ready]

    def _receive(self, process: _Process) -> ClipResult | None:
        """Take one message; a result, if it is one."""
        kind, value = process.receive()
        if kind == "log":
            self._log(*value)
        elif kind == "unopened":
            raise value
        return value if kind == "done" else None

    def _log(self, level: int, text: str, clip: str) -> None:
        """Log a warning of a worker with the name of its clip, and what is no warning once for all clips."""
        of_clip = clip != "" and clip in text
        if level >= logging.WARNING:
            logger.log(level, text if of_clip or not clip else f"{clip}: {text}")
        elif (alike := text.replace(clip, "")) not in self._said:
            self._said.add(alike)
            logger.log(level, f"{text} (said once for all clips)" if of_clip else text)

    def _start(self) -> None:
        self._started += 1
        work = self._work / f"{self._started}"
        work.mkdir()
        self._processes.append(_Process(self._job, work))

    def _remove(self, process: _Process) -> None:
        self._processes.remove(process)
        process.end()

    def _end(self) -> None:
        for process in self._processes:
            process.leave()
        for process in self._processes:
            process.end()
        self._processes.clear()


class _Process:
    """One process of the pool, as its parent sees it."""

    def __init__(self, job: Job, work: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share locks and CUDA
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job, work), daemon=True)
        resource_tracker.ensure_running()  # its start would unblock the signal
        with _blocked(signal.SIGINT):  # ctrl-C is for the parent, which ends its processes
            self.process.start()
        theirs.close()
        self.clip: Clip | None = None
        self.frames = 0
        self.ready = self.lost = False
        self._work = work

    def give(self, clip: Clip) -> None:
        self.clip, self.frames = clip, 0
        with contextlib.suppress(OSError):  # it has ended, as the next `receive` finds
            self.connection.send(clip)

    def receive(self) -> tuple[str, Any]:
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self.lost = True
            return "lost", None
        if kind == "frames":
            self.frames = value
        elif kind == "ready":
            self.ready = True
        elif kind == "done":
            self.clip, self.frames = None, 0
        return kind, value

    @property
    def ending(self) -> str:
        """How it ended, for messages; after `end`."""
        code = self.process.exitcode or 0
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")

    def leave(self) -> None:
        """Let it end if it waits for a clip, else end it."""
        if self.ready and self.clip is None:
            with contextlib.suppress(OSError):  # it has ended
                self.connection.send(None)
        else:
            self.process.terminate()

    def end(self) -> None:
        """Wait for its end, and end it if it takes long; delete what it left."""
        self.process.join(_END_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        shutil.rmtree(self._work, ignore_errors=True)


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Block a signal; a process that is started inside has it blocked for ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, job: Job, work: Path) -> None:
    """The process of a worker."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    line = _Line(connection)
    logger = logging.getLogger("stepcell")
    logger.setLevel(logging.INFO)
    logger.addHandler(line)
    try:
        runner = ClipRunner(job, work)
    except StepcellError as error:
        line.send("unopened", error)
    else:
        line.send("ready", runner.description)
        while (clip := connection.recv()) is not None:
            line.clip = display_name(str(clip.source))
            line.send("done", runner.run(clip, line.progress, _Control()))
            line.clip = ""
    os._exit(0)  # without the end of the interpreter, in which threads of FFmpeg may crash


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class _Control(RunControl):
    def give_up(self, error: DeviceError) -> None:
        """Only the end of the process ends a step that hangs."""
        os._exit(error.exit_code)


class _Line(logging.Handler):
    """The line to the parent, for results, progress and logs, from any thread."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.clip = ""
        self._connection, self._sending, self._shown = connection, threading.Lock(), 0.0

    def send(self, kind: str, value: Any) -> None:
        with self._sending:
            self._connection.send((kind, value))

    def progress(self, frames: int) -> None:
        now = time.monotonic()
        if now - self._shown >= _PROGRESS_SECONDS:
            self._shown = now
            self.send("frames", frames)

    def emit(self, record: logging.LogRecord) -> None:
        self.send("log", (record.levelno, record.getMessage(), self.clip))
