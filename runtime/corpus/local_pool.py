"""Runs clips in processes of this machine.

`concurrent.futures` gives up all its work when one process dies; here a process that is killed costs only its clip.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.resource_tracker as resource_tracker
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from stepcell.runtime.corpus.job import Clip, Job
from stepcell.runtime.corpus.pool import Pool, Worker
from stepcell.runtime.corpus.worker import ClipControl, ClipWorker

__all__ = ["LocalPool"]

_END_SECONDS = 5.0  # to wait for a process that is asked to end


class _Process(Worker):
    """One process of the pool, as its parent sees it."""

    def __init__(self, job: Job, work: Path) -> None:
        super().__init__(work)
        context = multiprocessing.get_context("spawn")  # a fork would share locks and CUDA
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job, work), daemon=True)
        resource_tracker.ensure_running()  # its start would unblock the signal
        with _blocked(signal.SIGINT):  # ctrl-C is for the parent, which ends its processes
            self.process.start()
        theirs.close()

    @property
    def ending(self) -> str:
        code = self.process.exitcode or 0
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")

    def leave(self) -> None:
        if self.ready and self.clip is None:
            with contextlib.suppress(OSError):  # it has ended
                self.connection.send(None)
        else:
            self.process.terminate()

    def _send(self, clip: Clip) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(clip)

    def _take(self) -> tuple[str, Any] | None:
        try:
            message: tuple[str, Any] = self.connection.recv()
        except (EOFError, OSError):
            return None
        return message

    def _end(self) -> None:
        self.process.join(_END_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


class LocalPool(Pool[_Process]):
    """A pool of processes that are started as needed."""

    def _start(self, work: Path) -> _Process:
        return _Process(self._job, work)

    def _answering(self, workers: Sequence[_Process], seconds: float) -> list[_Process]:
        ready = wait([process.connection for process in workers], seconds)
        return [process for process in workers if process.connection in ready]


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
    sending = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with sending:
            connection.send((kind, value))

    worker = ClipWorker(job, work, send)
    while worker.opened and (clip := connection.recv()) is not None:
        worker.run(clip, ClipControl())
    os._exit(0)  # without the end of the interpreter, in which threads of FFmpeg may crash


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
