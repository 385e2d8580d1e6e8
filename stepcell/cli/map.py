"""`stepcell map`: options for `map_clips`, signals, and what is printed."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import click

from stepcell.cli.clip_options import clip_options, read_clip_options
from stepcell.cli.common import json_option, leaving, overwrite_option
from stepcell.cli.console import LiveTable, console, log, print_json, stage
from stepcell.cli.signals import signal_control
from stepcell.cli.verified import check_verified
from stepcell.errors import StepcellError, UsageError
from stepcell.runtime.corpus.map_clips import Engine, MapProgress, MapReport, map_clips, parse_shard, read_list

__all__ = ["command"]

LIVE_SECONDS = 0.2  # interval between two updates of a terminal
PLAIN_SECONDS = 5.0  # interval between two lines of a log


@click.command(
    epilog="""\b
Examples:
  stepcell map model.onnx --input clips --output denoised
  stepcell map model.onnx --input 'clips/**/*.mp4' --output 'denoised/*.mkv' --workers 8
  find clips -name '*.mp4' > clips.txt; stepcell map model.onnx --list clips.txt --output denoised
  stepcell map model.onnx --input clips --output denoised --shard 2/8 --json
  stepcell map model.onnx --input /shared/clips --output /shared/denoised --engine ray --ray-address auto
  stepcell map model.engine --device cuda --workers 2 --input clips --output denoised
"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-i",
    "--input",
    "source",
    metavar="SOURCE",
    help="Folder of clips, or a pattern in quotes such as 'clips/**/*.mp4'.",
)
@click.option(
    "--list", "list_file", type=click.Path(dir_okay=False), metavar="FILE",
    help="In place of --input: a text file with one clip, or folder of pictures, a line.",
)  # fmt: skip
@click.option(
    "-o", "--output", required=True, metavar="FOLDER",
    help="Every clip gets an output of its own name there: a video, or an array for an array. A pattern such as "
    "'out/*.npy' chooses another kind.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(get_args(Engine)), default="local", show_default=True,
    help="Processes of this machine, or of a Ray cluster whose nodes share the folders of model, clips and outputs.",
)  # fmt: skip
@click.option(
    "--ray-address", metavar="HOST:PORT",
    help="A Ray cluster that this machine is part of; or auto.  [default: RAY_ADDRESS, else a new one for this run]",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(1, 1024), metavar="N",
    help="Processes, each with one clip at a time and one thread for its steps.  [default: one per core, 1 on a "
    "GPU; in a cluster one per CPU or GPU]",
)  # fmt: skip
@click.option(
    "--shard", "shard_text", default="1/1", metavar="I/N",
    help="Run the I-th of N parts of the clips, for machines or jobs that share a folder of outputs.",
)  # fmt: skip
@clip_options
@overwrite_option
@json_option
@leaving()
def command(
    model: Path,
    source: str | None,
    list_file: str | None,
    output: str,
    engine: Engine,
    ray_address: str | None,
    workers: int | None,
    shard_text: str,
    require_verified: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a corpus of recorded clips through the step loop, in several processes.

    MODEL comes first, as for `stepcell run`, whose results these are: each clip from the initial states. Outputs
    appear whole or not at all. A second call runs what is left, and refuses outputs of another model or other options.
    A clip that fails does not stop the others; a process that is killed costs its clip only, which is run once more.
    Failed clips are listed at the end, with exit code 1. Ctrl-C drops unfinished outputs; what is finished stays.
    """
    if (source is None) == (list_file is None):
        raise UsageError("--input, --list: expected one of them", hint="--input 'clips/*.mp4' or --list clips.txt")
    shard = parse_shard(shard_text)
    options = read_clip_options(options)
    check_verified(model, options["device"], required=require_verified)
    clips = source or read_list(str(list_file))
    with signal_control() as control, _View() as view:
        report = map_clips(
            model, clips, output, engine=engine, ray_address=ray_address, workers=workers, shard=shard,
            overwrite=overwrite, progress=view, control=control, **options,
        )  # fmt: skip
    _summarise(report)
    if as_json:
        print_json(report)
    if control.signal is not None:
        raise click.exceptions.Exit(128 + control.signal)
    if report.failed:
        lines = "".join(f"\n  {each.input}: {each.error}" for each in report.failed)
        raise StepcellError(
            f"{len(report.failed)} of {report.clips} clips failed:{lines}", hint="the same command runs them again"
        )


class _View:
    """Progress callback: a row on a terminal, otherwise a line now and then."""

    def __init__(self) -> None:
        self._shown = time.monotonic()
        self._live = LiveTable(("clips", "failed", "frames", "frames/s", "left")) if console.is_terminal else None

    def __enter__(self) -> _View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: MapProgress) -> None:
        now = time.monotonic()
        if now - self._shown < (PLAIN_SECONDS if self._live is None else LIVE_SECONDS):
            return
        self._shown = now
        clips, rate = f"{progress.done} of {progress.clips}", f"{progress.frames / progress.seconds:.1f}"
        left = "" if progress.left is None else _duration(progress.left)
        if self._live is not None:
            self._live.update([[clips, str(progress.failed), str(progress.frames), rate, left]])
            return
        failed = f" ({progress.failed} failed)" if progress.failed else ""
        log(f"{clips} clips{failed}, {progress.frames} frames, {rate} frames/s" + (f", {left} left" if left else ""))


def _duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _summarise(report: MapReport) -> None:
    counts = {
        "finished before": report.finished_before,
        "failed": len(report.failed),
        "not run": report.not_run,
    }
    parts = [f"{report.made} of {report.clips} clips", f"{report.frames} frames"]
    if report.made:
        parts += [f"{report.frames_per_second:.1f} frames/s", f"{report.workers} workers"]
    parts += [f"{count} {what}" for what, count in counts.items() if count]
    stage("map", report.output, report.seconds, ", ".join(parts))
