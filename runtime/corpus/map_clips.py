"""map_clips: runs a model over recorded clips in several processes, as `stepcell map` does."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from stepcell.errors import InputError, MissingDependencyError, OutputError, UsageError
from stepcell.files import Temporary, leftovers, read_bytes
from stepcell.runtime.corpus.clip_runner import ClipResult
from stepcell.runtime.corpus.job import Clip, Job, left_to_run
from stepcell.runtime.corpus.local_pool import LocalPool
from stepcell.runtime.corpus.pool import Pool
from stepcell.runtime.corpus.ray_pool import ray_pool
from stepcell.runtime.corpus.record import FOLDER
from stepcell.runtime.media.source import display_name
from stepcell.runtime.streams.clip_folder import clip_outputs, find_clips
from stepcell.runtime.streams.run_control import RunControl

__all__ = ["Engine", "FailedClip", "MapProgress", "MapReport", "map_clips", "parse_shard", "read_list"]

Engine = Literal["local", "ray"]

logger = logging.getLogger(__name__)

_OF_ALL_CLIPS = {each.exit_code: each for each in (UsageError, MissingDependencyError)}


class FailedClip(msgspec.Struct, frozen=True, kw_only=True):
    """A clip without an output, and why."""

    input: str
    error: str


class MapReport(msgspec.Struct, frozen=True, kw_only=True):
    """Report of `map_clips`.

    Attributes:
        model: its path.
        output: folder of the outputs.
        engine: "local" or "ray".
        workers: processes.
        clips: in all, of this shard.
        finished_before: clips that had an output already.
        made: clips run to their end.
        failed: clips that were not.
        not_run: clips that were left when it was stopped.
        frames: of the clips that were made.
        seconds: from the start of the first process to the end.
        frames_per_second: of the clips that were made.
    """

    model: str
    output: str
    engine: Engine
    workers: int
    clips: int
    finished_before: int
    made: int
    failed: list[FailedClip]
    not_run: int
    frames: int
    seconds: float
    frames_per_second: float


@dataclass(frozen=True)
class MapProgress:
    """Counters while clips are run.

    Attributes:
        clips: to be run.
        done: finished or failed.
        failed: of these.
        frames: stepped, those of unfinished clips too.
        seconds: since the start.
        left: seconds to the end, as the bytes of the clips that are done and of the others let expect; None: not known.
    """

    clips: int
    done: int
    failed: int
    frames: int
    seconds: float
    left: float | None


def map_clips(
    model: str | Path,
    source: str | Path | Sequence[Path],
    output: str | Path,
    *,
    engine: Engine = "local",
    ray_address: str | None = None,
    workers: int | None = None,
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    progress: Callable[[MapProgress], None] | None = None,
    control: RunControl | None = None,
    **options: Any,
) -> MapReport:
    """Run recorded clips through a model, each from the initial states; a second call runs what is left.

    Each worker is a process with one loop and one thread for its steps. A process that is killed costs only its clip,
    which is run once more. An output is moved into place when it is whole, with a record in `.stepcell-map` beside the
    outputs, by which a later call skips it. The processes are spawned, which imports the caller's module again: a
    script calls this below `if __name__ == "__main__"`.

    Args:
        model: path of a model.
        source: a folder of clips or a pattern, as of `run_streams`; or a list of clips.
        output: a folder or a pattern, as of `run_streams`. Clips of a list keep their folders as they are written.
        engine: "local": processes of this machine; "ray": actors of a Ray cluster, whose nodes see the model, the clips
            and the outputs under the same paths.
        ray_address: HOST:PORT of the cluster, or "auto"; None: that of RAY_ADDRESS, otherwise a cluster of this machine
            is started, and ended with the run.
        workers: processes; None: one for each core on the CPU, one on a GPU; in a cluster one for each CPU or GPU.
        shard: (number from 1, count): run only every count-th clip.
        overwrite: make outputs of another model or other options again, and replace files that stepcell did not write.
        progress: called a few times a second.
        control: stops the run: unfinished outputs are dropped.
        options: further options of `run_streams`, without those of live inputs, snapshots, metrics and reports.

    Returns:
        The report; clips that failed are in it.

    Raises:
        UsageError: no clips, an output that is an input or a foreign file, outputs of another model or with other
            options, or options that the first clip refuses.
        InputError: the model or a folder cannot be read.
        OutputError: the folder of the outputs cannot be written.
        MissingDependencyError: ray is not installed.
        DeviceError: the cluster does not answer.
        StepcellError: the model cannot be opened, as listed at `StepLoop.open`.
    """
    if ray_address is not None and engine != "ray":
        raise UsageError("--ray-address: is of --engine ray", hint="add --engine ray, or omit the address")
    control = control or RunControl()
    sources, targets, root = _plan(source, str(output))
    job = Job(Path(model), root, options)
    number, count = shard
    chosen = slice(number - 1, None, count)
    clips = left_to_run(job, sources[chosen], targets[chosen], overwrite=overwrite)
    tally, used = _Tally(clips), 0
    if clips:
        with _work_folder(root) as work, _pool(engine, job, clips, work, workers, ray_address) as pool:
            used = pool.workers

            def tick() -> None:
                if progress is not None:
                    progress(tally.progress(pool.running))

            pool.run(clips, tally.add, control, tick)
            tick()
    return MapReport(
        model=display_name(str(model)),
        output=str(root),
        engine=engine,
        workers=used,
        clips=len(sources[chosen]),
        finished_before=len(sources[chosen]) - len(clips),
        made=tally.made,
        failed=tally.failed,
        not_run=len(clips) - tally.made - len(tally.failed),
        frames=tally.frames,
        seconds=round(tally.seconds, 3),
        frames_per_second=round(tally.frames / tally.seconds, 2) if tally.frames else 0.0,
    )


def read_list(text: str) -> list[Path]:
    """The clips that a file names, one path a line.

    Raises:
        InputError: the file cannot be read, or names nothing.
        UsageError: a folder of several clips.
    """
    lines = os.fsdecode(read_bytes(Path(text))).split("\n")
    paths = list(dict.fromkeys(Path(line.rstrip("\r")) for line in lines if line.strip()))
    if not paths:
        raise InputError(f"{text}: names no clips")
    for path in paths:
        if path.is_dir() and find_clips(str(path)) is not None:
            raise UsageError(f"--list {text}: {path} is a folder of clips", hint="name each clip, or use --input")
    return paths


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8).

    Raises:
        UsageError: another form, or a number outside 1 to the count.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(
            f"--shard: expected NUMBER/COUNT from 1/COUNT to COUNT/COUNT, got {text!r}", hint="such as 1/4"
        )
    return number, count


def _plan(source: str | Path | Sequence[Path], output: str) -> tuple[list[Path], list[Path], Path]:
    """The clips, their outputs, and the folder of the outputs."""
    if isinstance(source, (str, Path)):
        text = str(source)
        sources = find_clips(text)
        if sources is None and Path(text).is_file():
            sources = [Path(text)]
            text = str(Path(text).parent)
        if sources is None and not os.path.lexists(text):
            raise InputError(f"{text}: cannot be read (No such file or directory)")
        if sources is None:
            raise UsageError(
                f"--input {text}: expected a folder of clips, a pattern such as 'clips/*.mp4' or a clip",
                hint="cameras, URLs and pictures are for `stepcell run`; a list of clips is given with --list FILE",
            )
    else:
        text, sources = None, list(source)
    targets = clip_outputs(text, sources, output)
    pattern = Path(output)
    return sources, targets, pattern.parent if "*" in pattern.name else pattern


@contextlib.contextmanager
def _pool(
    engine: Engine, job: Job, clips: Sequence[Clip], work: Path, workers: int | None, address: str | None
) -> Iterator[Pool[Any]]:
    if engine == "ray":
        with ray_pool(job, clips, work, workers=workers, address=address) as pool:
            yield pool
        return
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if str(job.options.get("device", "cpu")) == "cpu" else 1
    yield LocalPool(job, max(1, min(workers, len(clips))), work)


@contextlib.contextmanager
def _work_folder(root: Path) -> Iterator[Path]:
    """A folder for unfinished outputs, deleted at the end; those of killed runs are deleted first."""
    folder = root / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left, _ in leftovers(folder):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        work = Temporary(folder / "work", folder=True)
    except OSError as error:
        raise OutputError(f"--output {root}: cannot be written ({error.strerror})") from error
    try:
        yield work.path
    finally:
        work.delete()


class _Tally:
    """Counts clips while they end."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.made = self.frames = 0
        self.failed: list[FailedClip] = []
        self._clips = clips
        self._bytes = sum(clip.size for clip in clips)
        self._bytes_done = 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def add(self, clip: Clip, result: ClipResult) -> None:
        """Count a clip.

        Raises:
            UsageError, MissingDependencyError: the first clip was refused for what is the same for all.
        """
        self._bytes_done += clip.size
        if result.error is None:
            self.made += 1
            self.frames += result.frames
            return
        if result.exit_code in _OF_ALL_CLIPS and not self.made:
            raise _OF_ALL_CLIPS[result.exit_code](result.error, hint=result.hint)
        name = display_name(str(clip.source))
        message = result.error.removeprefix(f"{name}: ")
        self.failed.append(FailedClip(input=name, error=message))
        logger.warning(f"{name}: failed: {message}")

    def progress(self, running: int) -> MapProgress:
        seconds, done = self.seconds, self.made + len(self.failed)
        left = None
        if self._bytes_done:
            left = seconds * (self._bytes - self._bytes_done) / self._bytes_done
        return MapProgress(len(self._clips), done, len(self.failed), self.frames + running, seconds, left)
