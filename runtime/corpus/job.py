"""What a corpus is run with, and which of its clips are left to run."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from stepcell.errors import UsageError
from stepcell.overwrite import check_output, is_marked
from stepcell.runtime.corpus.record import Record, model_sha256, output_size, read_record, record_path
from stepcell.runtime.streams.run import run_streams

__all__ = ["Clip", "Job", "left_to_run"]

logger = logging.getLogger(__name__)

_LOOP_OPTIONS = ("device", "allow_fallback", "check_file")  # which change no result beyond rounding


@dataclass(frozen=True)
class Job:
    """A model with its options, and the folder of its outputs.

    Args:
        model: its path.
        root: the folder of the outputs, which has their records too.
        options: of `run_streams`, without those of inputs and outputs, snapshots and reports.

    Attributes:
        loop: the options that open the model.
        run: the options of each clip.
        made_by: SHA-256 of the model, and the options that change results and are not at their default.

    Raises:
        InputError: the model cannot be read.
    """

    model: Path
    root: Path
    options: Mapping[str, Any]
    made_by: tuple[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "made_by", (model_sha256(self.model), self._changed_options()))

    @property
    def loop(self) -> dict[str, Any]:
        return {name: self.options[name] for name in (*_LOOP_OPTIONS, "keep_float16") if name in self.options}

    @property
    def run(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name not in self.loop}

    def _changed_options(self) -> dict[str, Any]:
        defaults = inspect.signature(run_streams).parameters
        changed = {
            name: value
            for name, value in self.options.items()
            if name not in _LOOP_OPTIONS and value and value != defaults[name].default
        }
        options: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(changed, enc_hook=str, order="sorted"))
        return options


@dataclass(frozen=True)
class Clip:
    """A clip to run.

    Attributes:
        source: the file, or a folder of pictures.
        target: its output.
        size, modified: of the source when the run was planned: bytes, and time of change in nanoseconds.
    """

    source: Path
    target: Path
    size: int = 0
    modified: int = 0


def left_to_run(job: Job, sources: Sequence[Path], targets: Sequence[Path], *, overwrite: bool = False) -> list[Clip]:
    """The clips without a finished output of this job; logs how many have one, and why others are run again.

    Args:
        sources, targets: each clip with its output.
        overwrite: replace outputs of another model or other options, and files that stepcell did not write.

    Raises:
        UsageError: an output is an input or a foreign file, or was made by another model or with other options; or a
            clip is an output of this folder.
    """
    inputs = {identity for source in sources if (identity := _identity(source))}
    for source in sources:
        _refuse_own_output(job, source)
    clips: list[Clip] = []
    others: list[tuple[Path, Record]] = []
    changed = unknown = 0
    for source, target in zip(sources, targets, strict=True):
        clip = _clip(source, target)
        if _identity(target) in inputs:
            raise UsageError(f"--output {target}: also used as an input", hint="name another folder")
        record = read_record(record_path(job.root, target))
        if not os.path.lexists(target):
            pass
        elif record is None or record.output_size != output_size(target):
            _require_ours(job, target, overwrite=overwrite)
            unknown += 1
        elif (record.model, record.options) != job.made_by:
            others.append((target, record))
        elif (record.input_size, record.input_modified) == (clip.size, clip.modified):
            continue
        else:
            changed += 1
        clips.append(clip)
    if others and not overwrite:
        raise _of_another(job, others)
    if finished := len(sources) - len(clips):
        logger.info(f"{job.root}: {finished} of {len(sources)} clips are finished already")
    for count, why in (
        (len(others), "of another model or other options"),
        (changed, "whose clips have changed since"),
        (unknown, "without a record that fits"),
    ):
        if count:
            logger.warning(f"{job.root}: {count} outputs {why} are made again")
    return clips


def _clip(source: Path, target: Path) -> Clip:
    try:
        found = source.stat()
    except OSError:  # reported when it is run
        return Clip(source, target)
    return Clip(source, target, found.st_size, found.st_mtime_ns)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _refuse_own_output(job: Job, source: Path) -> None:
    """Refuse a pattern such as `clips/**/*.mp4` that finds the outputs of an earlier run in `clips/out`."""
    root, path = job.root.resolve(), source.resolve()
    if path.is_relative_to(root) and record_path(root, path).is_file():
        raise UsageError(
            f"--input: {source} is an output of `stepcell map` in {job.root}",
            hint="name the clips by a pattern that does not find the outputs, or an --output outside their folder",
        )


def _require_ours(job: Job, target: Path, *, overwrite: bool) -> None:
    """Raise UsageError for a file that stepcell did not write, and for a folder with files."""
    check_output(target, is_marked, reads={job.model: "the model"}, overwrite=overwrite)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UsageError(
            f"--output {target}: is a folder with files", hint="choose another name, or replace it with --overwrite"
        )


def _of_another(job: Job, others: Sequence[tuple[Path, Record]]) -> UsageError:
    target, record = others[0]
    model, options = job.made_by
    if record.model != model:
        what = f"by another model: SHA-256 {record.model[:12]}..., {job.model} has {model[:12]}..."
    else:
        names = sorted(name for name in {*options, *record.options} if options.get(name) != record.options.get(name))
        said = [f"{name}: {record.options.get(name, 'default')}, now {options.get(name, 'default')}" for name in names]
        what = f"with other options: {'; '.join(said)}"
    more = f", and so were {len(others) - 1} more" if len(others) > 1 else ""
    return UsageError(
        f"--output {target}: was made {what}{more}",
        hint="choose another folder, or make all again with --overwrite",
    )
