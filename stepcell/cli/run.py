"""`stepcell run`: a stream through a model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import click
import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stepcell.cli.common import json_option
from stepcell.console import console, log, print_json, stage, table
from stepcell.errors import OutputError, UsageError
from stepcell.files import write_atomic
from stepcell.runtime.frames import event_input, image_input
from stepcell.runtime.loop import StepLoop
from stepcell.runtime.policies import OnNonFinite, ResetPolicy, ResetWatch, reset_on_signal
from stepcell.runtime.report import RunReport, StreamError
from stepcell.runtime.saving import SnapshotWriter
from stepcell.runtime.sinks import Sink, open_sink
from stepcell.runtime.sources import open_source, parse_size
from stepcell.runtime.stop import StopRequest
from stepcell.runtime.stream import run_stream

__all__ = ["command"]

SNAPSHOT_EVERY = 250  # frames: ten seconds of a camera
DEFAULT_FPS = Fraction(25)  # of an output whose input has no rate of its own
PLAIN_SECONDS = 5.0  # between two lines where stderr is not a terminal


def _parse_rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise UsageError(f"--fps: expected frames per second such as 25, 29.97 or 30000/1001, got {text!r}")
    return rate


@click.command(
    epilog="""\b
Examples:
  stepcell run model.onnx --input clip.mp4 --output out.mp4
  stepcell run model.onnx --input frames --output denoised
  stepcell run model.onnx --input clip.mp4 --limit 100 --json
  stepcell run model.engine --device cuda --input camera:0 --output out.mp4
  stepcell run model.onnx --input camera:0 --snapshot state.safetensors --resume
  decoder | stepcell run model.onnx --input - --size 640x480 --output - | encoder
"""
)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-i", "--input", "source_name", required=True, metavar="SOURCE",
    help="Video file or URL, folder of .png/.jpg, .npy, camera:N, or - for raw rgb24 frames on stdin; "
    "for a model of events .dat, .raw or .npz.",
)  # fmt: skip
@click.option(
    "-o", "--output", "sink_name", metavar="SINK",
    help=".mp4/.mkv/.mov, .npy (the model's own numbers), a new folder of .png, or - for raw frames on stdout. "
    "Without it the frames are only stepped, as a benchmark.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N: this device or an error.")
@click.option("--allow-fallback", is_flag=True, help="Run on the CPU where CUDA does not load, and say so.")
@click.option("--keep-float16", is_flag=True, help="On a CPU, run a float16 model in float16 too (slower).")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads for one step.  [default: one per core]")
@click.option("--fps", "fps_text", metavar="N", help="Frame rate of the output.  [default: the input's, else 25]")
@click.option("--reset-every", type=click.IntRange(1), metavar="N", help="Forget the past before every N frames.")
@click.option(
    "--reset-gap", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
    help="Forget the past where two frames are further apart than this.",
)  # fmt: skip
@click.option("--reset-on-cut", is_flag=True, help="Forget the past at a scene cut.")
@click.option(
    "--on-nonfinite", type=click.Choice(["stop", "reset", "ignore"]), default="stop", show_default=True,
    help="NaN or Inf in an output or a state: end the run, forget the past and go on, or take no notice.",
)  # fmt: skip
@click.option(
    "--snapshot", "snapshot_path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Write the states there (.safetensors), now and then and at the end.",
)  # fmt: skip
@click.option("--snapshot-every", type=click.IntRange(1), metavar="N", help="After every N frames.  [default: 250]")
@click.option("--resume", is_flag=True, help="Go on from --snapshot, where there is one, at the frame after it.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Stop after N frames.")
@click.option("--size", "size_text", metavar="WxH", help="Size of raw frames on stdin, or of an event camera.")
@click.option(
    "--event-window", metavar="WINDOW",
    help="Events of one step: 30ms, 15000events or 0.35events/pixel.  [default: the contract's]",
)  # fmt: skip
@click.option(
    "--report", "report_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the report there, as JSON."
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    source_name: str,
    sink_name: str | None,
    device: str,
    allow_fallback: bool,
    keep_float16: bool,
    threads: int | None,
    fps_text: str | None,
    reset_every: int | None,
    reset_gap: float | None,
    reset_on_cut: bool,
    on_nonfinite: OnNonFinite,
    snapshot_path: Path | None,
    snapshot_every: int | None,
    resume: bool,
    limit: int | None,
    size_text: str | None,
    event_window: str | None,
    report_path: Path | None,
    as_json: bool,
) -> None:
    """Run the step loop over a stream of frames.

    Frames are padded to the model's multiple and cropped back, and scaled as its contract says.
    Ctrl-C stops after the frame at hand; what was written is a valid file. SIGUSR1 makes it forget
    the past.
    """
    size = parse_size(size_text) if size_text else None
    fps = _parse_rate(fps_text) if fps_text else None
    if snapshot_path is None and (resume or snapshot_every is not None):
        raise UsageError("--resume and --snapshot-every need --snapshot FILE")
    _check_names(model, source_name, {"--output": sink_name, "--report": report_path, "--snapshot": snapshot_path})
    if as_json and sink_name == "-":
        raise UsageError("--json and --output - both write to stdout", hint="--report FILE writes the report to a file")

    def deliver(report: RunReport) -> None:
        _summary(report)
        if report_path is not None:
            write_atomic(report_path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
        if as_json:
            print_json(report)

    stop = StopRequest()
    resets = ResetWatch(ResetPolicy(reset_every, reset_gap, reset_on_cut, on_nonfinite))
    with (
        stop.listening(),
        reset_on_signal(resets),
        StepLoop.open(model, device, allow_fallback=allow_fallback, keep_float16=keep_float16, threads=threads) as loop,
    ):
        log(f"{model}: {loop.description}")
        start = _resume(loop, snapshot_path) if resume and snapshot_path else 0
        spec = image_input(loop.contract)
        events = event_input(spec, event_window)
        source = open_source(source_name, channels=int(spec.shape[1]), size=size, events=events)
        sink: Sink | None = None
        if sink_name is not None:
            sink = open_sink(sink_name, fps or source.fps or DEFAULT_FPS)
        snapshots = None
        if snapshot_path is not None:
            snapshots = SnapshotWriter(snapshot_path, snapshot_every or SNAPSHOT_EVERY, source.name)
        left = None if source.length is None else max(0, source.length - start)
        total = min(filter(None, (left, limit)), default=None)
        try:
            with _progress(loop, total) as display:
                report = run_stream(
                    loop,
                    source,
                    sink,
                    resets=resets,
                    snapshots=snapshots,
                    start=start,
                    limit=limit,
                    stop=stop,
                    on_frame=display.frame,
                )
        except StreamError as error:
            deliver(error.report)
            raise
    deliver(report)
    if stop.signal is not None:
        ctx.exit(128 + stop.signal)


def _resume(loop: StepLoop, path: Path) -> int:
    """Frames that were stepped before; 0 where there is no snapshot yet, as at a service's first start."""
    if not path.exists():
        log(f"{path}: no snapshot yet: starting from the beginning")
        return 0
    snapshot = loop.restore(path)
    log(f"{path}: going on at frame {snapshot.frame} of {snapshot.metadata.get('input', 'an unnamed input')}")
    return snapshot.frame


def _check_names(model: Path, source: str, written: Mapping[str, str | Path | None]) -> None:
    """Nothing may be written over something that is read, or twice."""
    files = {"the model": str(model), "--input": source}
    for option, name in written.items():
        if name is None or name == "-":
            continue
        for other, taken in files.items():
            if Path(name).resolve() == Path(taken).resolve():
                raise UsageError(f"{option} {name}: is {other} as well", hint="choose another name")
        files[option] = str(name)
        if isinstance(name, Path) and not name.absolute().parent.is_dir():
            raise OutputError(f"{option} {name}: its folder does not exist")  # said now, not after the run


class _Display:
    """Frames, frames per second and latency while a stream runs."""

    def __init__(self, loop: StepLoop, total: int | None, bar: Progress | None) -> None:
        self._loop, self._total, self._bar = loop, total, bar
        self._started = self._shown = time.monotonic()
        self._task = bar.add_task("frames", total=total, fps="", latency="") if bar else None

    def frame(self, count: int) -> None:
        now = time.monotonic()
        wait = 0.1 if self._bar else PLAIN_SECONDS
        if now - self._shown < wait and count != self._total:
            return
        self._shown = now
        rate = f"{count / (now - self._started):.1f} frames/s"
        latency = f"{(self._loop.statistics.mean or 0) * 1e3:.2f} ms/step"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=count, fps=rate, latency=latency)
        elif count != self._total:
            log(f"{count}{f' of {self._total}' if self._total else ''} frames, {rate}, {latency}")


@contextmanager
def _progress(loop: StepLoop, total: int | None) -> Iterator[_Display]:
    if not console.is_terminal:
        yield _Display(loop, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[fps]}  {task.fields[latency]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield _Display(loop, total, bar)


def _summary(report: RunReport) -> None:
    if report.frames == 0:
        return
    width, height = report.frame_size or (0, 0)
    rows = []
    for part in ("decode", "convert", "step", "encode"):
        times = getattr(report, part)
        if times.first_ms is not None:
            figures = (times.mean_ms, times.p50_ms, times.p90_ms, times.p95_ms, times.p99_ms, times.max_ms)
            rows.append([part, f"{times.first_ms:.2f}", *("" if f is None else f"{f:.2f}" for f in figures)])
    table("", ["ms per frame", "first", "mean", "p50", "p90", "p95", "p99", "max"], rows)
    counted = ", ".join(f"{count} {cause}" for cause, count in report.resets.items() if count)
    if counted:
        log(f"resets: {counted}")
    ending = {"interrupted": ", stopped by a signal", "error": ", broken off"}.get(report.stopped, "")
    rate = f"{report.frames} frames of {width}x{height}, {report.frames_per_second:.1f} frames/s"
    stage("run", report.output or "no output", report.seconds, rate + ending)
