"""Runs clips through one step loop, one after another: each output appears whole, with its record, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stepcell import __version__
from stepcell.display import displayed
from stepcell.errors import OutputError, StepcellError
from stepcell.library_errors import as_stepcell_error
from stepcell.runtime.corpus.job import Clip, Job
from stepcell.runtime.corpus.record import Record, output_size, record_path, write_record
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.media.source import display_name
from stepcell.runtime.streams.run import run_streams
from stepcell.runtime.streams.run_control import RunControl

__all__ = ["ClipResult", "ClipRunner"]


@dataclass(frozen=True)
class ClipResult:
    """How a clip ended. Its fields pass between processes.

    Attributes:
        frames: frames stepped.
        error, hint, exit_code: of the error that ended it; None: its output is finished.
    """

    frames: int = 0
    error: str | None = None
    hint: str | None = None
    exit_code: int = 0


class ClipRunner:
    """Opens the model of a job, with one thread for a step on the CPU.

    Args:
        work: a folder of its own beside the outputs, in which they are written.

    Attributes:
        description: of the back end, for display.

    Raises:
        StepcellError: the model cannot be opened, as listed at `StepLoop.open`.
    """

    def __init__(self, job: Job, work: Path) -> None:
        self._job, self._work = job, work
        # Not whichever is faster here: every process, on every machine, is to write the same bytes.
        self._loop = StepLoop.open(job.model, threads=1, backend="onnxruntime", **job.loop)
        self.description = self._loop.description

    def run(self, clip: Clip, progress: Callable[[int], None], control: RunControl) -> ClipResult:
        """Run a clip from the initial states.

        Args:
            clip: its output must not be a file that has to be kept.
            progress: called after each step with the number of frames.
            control: passed on to `run_streams`.
        """
        frames = 0

        def count(done: int) -> None:
            nonlocal frames
            frames = done
            progress(done)

        try:
            self._run(clip, count, control)
        except StepcellError as error:
            return ClipResult(frames, *self._shown(error, clip), error.exit_code)
        except Exception as error:  # of a library: it costs this clip only
            failure = as_stepcell_error(error, str(clip.source))
            return ClipResult(frames, failure.message, failure.hint, failure.exit_code)
        finally:
            self._clear()
        return ClipResult(frames)

    def close(self) -> None:
        """Free the model."""
        self._loop.close()

    def _run(self, clip: Clip, progress: Callable[[int], None], control: RunControl) -> None:
        temporary = self._work / clip.target.name
        (report,) = run_streams(
            self._loop, clip.source, temporary, control=control,
            progress=lambda run: progress(run.streams[0].frames), **self._job.run,
        ).streams  # fmt: skip
        if report.stopped not in ("end of input", "limit") or report.written != report.frames:
            raise OutputError(f"{clip.source}: {report.stopped}, {report.written} of {report.frames} frames written")
        if not report.frames:
            raise OutputError(f"{clip.source}: has no frames")
        model, options = self._job.made_by
        try:
            size = output_size(temporary)
            path = record_path(self._job.root, clip.target)
            path.unlink(missing_ok=True)
            self._place(temporary, clip.target)
            write_record(
                path,
                Record(
                    stepcell=__version__,
                    model=model,
                    options=options,
                    input=displayed(str(clip.source)),
                    input_size=clip.size,
                    input_modified=clip.modified,
                    output_size=size,
                    frames=report.frames,
                    seconds=report.seconds,
                ),
            )
        except OSError as error:
            raise OutputError(f"{clip.target}: cannot be written ({error.strerror})") from error

    def _place(self, temporary: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if temporary.is_dir():
            if target.exists():
                target.rename(self._work / f"old {target.name}")
        else:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(target)

    def _shown(self, error: StepcellError, clip: Clip) -> tuple[str, str | None]:
        """Message and hint with the name of the output in place of its temporary one.

        What they say of a part of the output that was kept is left out: it is not kept.
        """
        work, name = str(self._work), display_name(str(self._work / clip.target.name))
        message = error.message.partition(f" ({name}")[0].replace(work, str(clip.target.parent))
        return message, None if error.hint and work in error.hint else error.hint

    def _clear(self) -> None:
        for path in self._work.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
