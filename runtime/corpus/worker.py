"""What a worker of a pool does: it opens the model, runs clips, and says what happens."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepcell.errors import DeviceError, StepcellError
from stepcell.runtime.corpus.clip_runner import ClipRunner
from stepcell.runtime.corpus.job import Clip, Job
from stepcell.runtime.media.source import display_name
from stepcell.runtime.streams.run_control import RunControl

__all__ = ["ClipControl", "ClipWorker"]

_PROGRESS_SECONDS = 0.2  # between two counts of frames of one clip


class ClipControl(RunControl):
    """The control of a clip in a process that is a worker."""

    def give_up(self, error: DeviceError) -> None:
        """Only the end of the process ends a step that hangs."""
        os._exit(error.exit_code)


class ClipWorker:
    """Opens the model of a job in a process of its own; everything is told to the pool.

    The messages are ("ready", description) or ("unopened", error), then for each clip ("frames", count) now and then
    and ("done", `ClipResult`); at any time ("log", (level, text, name of the clip)).

    Args:
        work: an empty folder beside the outputs.
        send: called with each message, from any thread.

    Attributes:
        opened: the model was opened.
    """

    def __init__(self, job: Job, work: Path, send: Callable[[str, Any], None]) -> None:
        self._send = send
        self._log = _LogLine(send)
        logger = logging.getLogger("stepcell")
        logger.setLevel(logging.INFO)
        logger.addHandler(self._log)
        self._runner: ClipRunner | None = None
        try:
            self._runner = ClipRunner(job, work)
        except StepcellError as error:
            send("unopened", error)
        else:
            send("ready", self._runner.description)

    @property
    def opened(self) -> bool:
        return self._runner is not None

    def run(self, clip: Clip, control: ClipControl) -> None:
        """Run a clip; after the model was opened."""
        assert self._runner is not None
        self._log.clip = display_name(str(clip.source))
        shown = 0.0

        def progress(frames: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= _PROGRESS_SECONDS:
                shown = now
                self._send("frames", frames)

        self._send("done", self._runner.run(clip, progress, control))
        self._log.clip = ""


class _LogLine(logging.Handler):
    """Sends what is logged."""

    def __init__(self, send: Callable[[str, Any], None]) -> None:
        super().__init__()
        self.clip = ""
        self._send_message = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send_message("log", (record.levelno, record.getMessage(), self.clip))
