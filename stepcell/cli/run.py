"""`stepcell run`: streams through a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import click
import msgspec

from stepcell.cli.common import json_option, leaving
from stepcell.cli.console import log, print_json
from stepcell.cli.streams import Streams, check_names
from stepcell.cli.view import View, summarise
from stepcell.errors import InputError, OutputError, StepcellError, UsageError
from stepcell.files import write_atomic
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.media.preprocess import event_input, image_input
from stepcell.runtime.media.sources import RATES, parse_size, shown
from stepcell.runtime.streams.metrics import Metrics, parse_address
from stepcell.runtime.streams.report import RunReport, StreamError, StreamsError, StreamsReport
from stepcell.runtime.streams.reset_policy import OnNonFinite, ResetPolicy, ResetWatch, reset_on_signal
from stepcell.runtime.streams.run import run_streams
from stepcell.runtime.streams.scheduler import Watcher
from stepcell.runtime.streams.shutdown import StopRequest
from stepcell.runtime.streams.snapshot_writer import SnapshotWriter, saved_frames
from stepcell.runtime.streams.stream import Deadline, Lane, OnLate

__all__ = ["command"]

SNAPSHOT_EVERY = 250  # frames: ten seconds of a camera


def _parse_rate(text: str) -> Fraction:
    try:  # an exponent such as 1e99999999 is a number that takes hours to write down
        rate = Fraction(text) if "e" not in text.lower() and len(text) <= 40 else Fraction(0)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not RATES[0] <= rate <= RATES[1]:
        raise UsageError(f"--fps: expected frames per second such as 25, 29.97 or 30000/1001, got {text!r}")
    return rate


def _no_nan(_ctx: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):
        raise click.BadParameter("expected a number, got nan")
    return value


@click.command(
    epilog="""\b
Examples:
  stepcell run model.onnx --input clip.mp4 --output out.mp4
  stepcell run model.onnx --input frames --output denoised
  stepcell run model.onnx --input clip.mp4 --limit 100 --json
  stepcell run model.onnx --input a.mp4 --input b.mp4 --output a-out.mp4 --output b-out.mp4
  stepcell run model.engine --device cuda --input camera:0 --output out.mp4
  stepcell run model.onnx --input rtsp://host/door --reconnect inf --deadline-ms 100 --metrics-port 9095
  stepcell run model.onnx --input camera:0 --snapshot state.safetensors --resume
  stepcell run firenet.onnx --input events.dat --event-window 30ms --output out.mp4
  decoder | stepcell run model.onnx --input - --size 640x480 --output - | encoder
"""
)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-i", "--input", "inputs", required=True, multiple=True, metavar="SOURCE",
    help="Video file or URL, folder of .png/.jpg, .npy, camera:N, or - for raw rgb24 frames on stdin; "
    "for a model of events .dat, .raw or .npz. Several inputs share one batched step.",
)  # fmt: skip
@click.option(
    "-o", "--output", "outputs", multiple=True, metavar="SINK",
    help=".mp4/.mkv/.mov, .npy (the model's own numbers), a new folder of .png, or - for raw frames on stdout; "
    "one for each input. Without it the frames are only stepped, as a benchmark.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N: this device or an error.")
@click.option("--allow-fallback", is_flag=True, help="Run on the CPU where CUDA does not load, and say so.")
@click.option("--keep-float16", is_flag=True, help="On a CPU, run a float16 model in float16 too (slower).")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads for one step.  [default: one per core]")
@click.option("--fps", "fps_text", metavar="N", help="Frame rate of the output.  [default: the input's, else 25]")
@click.option(
    "--deadline-ms", type=click.FloatRange(0, min_open=True), callback=_no_nan, metavar="MS",
    help="A frame of a camera, a URL or stdin that waited longer than this is late.",
)  # fmt: skip
@click.option(
    "--on-late", type=click.Choice(["drop", "block"]), default="drop", show_default=True,
    help="Late frames: leave them out and count them, or step and count them while the source waits.",
)  # fmt: skip
@click.option(
    "--reconnect", "patience", type=click.FloatRange(0), callback=_no_nan, default=0, metavar="SECONDS",
    help="Open a lost camera or URL again, for up to this long after its last frame (inf: for ever).",
)  # fmt: skip
@click.option("--reset-every", type=click.IntRange(1), metavar="N", help="Forget the past before every N frames.")
@click.option(
    "--reset-gap", type=click.FloatRange(0, min_open=True), callback=_no_nan, metavar="SECONDS",
    help="Forget the past where two frames are further apart than this.",
)  # fmt: skip
@click.option("--reset-on-cut", is_flag=True, help="Forget the past at a scene cut.")
@click.option(
    "--on-nonfinite", type=click.Choice(["stop", "reset", "ignore"]), default="stop", show_default=True,
    help="NaN or Inf in an output or a state: end the stream, forget the past and go on, or take no notice.",
)  # fmt: skip
@click.option(
    "--snapshot", "snapshot_path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Write the states there (.safetensors), now and then and at the end.",
)  # fmt: skip
@click.option("--snapshot-every", type=click.IntRange(1), metavar="N", help="After every N frames.  [default: 250]")
@click.option("--resume", is_flag=True, help="Go on from --snapshot, where there is one, at the frame after it.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Stop each stream after N frames.")
@click.option("--size", "size_text", metavar="WxH", help="Size of raw frames on stdin, or of an event camera.")
@click.option(
    "--event-window", metavar="WINDOW",
    help="Events of one step: 30ms, 15000events or 0.35events/pixel.  [default: the contract's]",
)  # fmt: skip
@click.option(
    "--metrics-port", "address_text", metavar="[ADDRESS:]PORT",
    help="Serve Prometheus metrics there.  [default address: 127.0.0.1]",
)  # fmt: skip
@click.option(
    "--report", "report_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the report there, as JSON."
)
@json_option
@click.pass_context
@leaving()
def command(
    ctx: click.Context,
    model: Path,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    device: str,
    allow_fallback: bool,
    keep_float16: bool,
    threads: int | None,
    fps_text: str | None,
    deadline_ms: float | None,
    on_late: OnLate,
    patience: float,
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
    address_text: str | None,
    report_path: Path | None,
    as_json: bool,
) -> None:
    """Run the step loop over one stream of frames or several.

    Frames are padded to the model's multiple and cropped back, and scaled as its contract says.
    Ctrl-C stops after the step at hand; what was written is a valid file. SIGUSR1 makes every
    stream forget the past.
    """
    if snapshot_path is None and (resume or snapshot_every is not None):
        raise UsageError("--resume and --snapshot-every need --snapshot FILE")
    check_names(model, inputs, outputs, {"--report": report_path, "--snapshot": snapshot_path})
    if as_json and "-" in outputs:
        raise UsageError("--json and --output - both write to stdout", hint="--report FILE writes the report to a file")
    streams = Streams(
        inputs=inputs,
        outputs=outputs,
        size=parse_size(size_text) if size_text else None,
        fps=_parse_rate(fps_text) if fps_text else None,
        policy=ResetPolicy(reset_every, reset_gap, reset_on_cut, on_nonfinite),
        deadline=Deadline(deadline_ms / 1e3, on_late) if deadline_ms is not None else None,
        patience=patience,
        limit=limit,
    )
    address = parse_address(address_text) if address_text else None
    stop = StopRequest()
    slots = len(inputs) if len(inputs) > 1 else None
    watches: list[ResetWatch] = []
    with (
        stop.listening(),
        reset_on_signal(watches),
        StepLoop.open(
            model, device, slots=slots, allow_fallback=allow_fallback, keep_float16=keep_float16, threads=threads
        ) as loop,
    ):
        log(f"{model}: {loop.description}")
        spec = image_input(loop.contract, len(inputs))
        starts = _resume(loop, snapshot_path, streams.names) if resume and snapshot_path else {}
        snapshots = None
        if snapshot_path is not None:
            snapshots = SnapshotWriter(snapshot_path, snapshot_every or SNAPSHOT_EVERY, ", ".join(streams.names))
        lanes: list[Lane] = []
        watchers: list[Watcher] = []
        with ExitStack() as stack:
            if address is not None:
                metrics = stack.enter_context(Metrics(lanes, address[1], address[0]))
                log(f"metrics: http://{metrics.address}:{metrics.port}/metrics")
                watchers.append(metrics)
            lanes += streams.open(spec, event_input(spec, event_window), starts, stop)
            watches += [lane.watch for lane in lanes]
            watchers.append(stack.enter_context(View(lanes)))
            reports = run_streams(loop, lanes, snapshots=snapshots, stop=stop, watchers=watchers)
        summarise(lanes, reports)
        report = reports[0] if len(lanes) == 1 else StreamsReport(model=shown(str(model)), streams=reports)
        error = _failure(lanes, reports)
        if report_path is not None:
            try:
                write_atomic(report_path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
            except OutputError as unwritten:
                if error is not None:  # what broke a stream is said last, and decides the exit code
                    log(unwritten.message)
                error = error or unwritten
        if as_json:
            print_json(report)
        if error is not None:
            raise error
    if stop.signal is not None:
        ctx.exit(128 + stop.signal)


def _failure(lanes: Sequence[Lane], reports: Sequence[RunReport]) -> StepcellError | None:
    failures = {lane.name: lane.failure for lane in lanes if lane.failure is not None}
    if not failures:
        return None
    if len(lanes) == 1:
        return StreamError(failures[lanes[0].name], reports[0])
    return StreamsError(failures, len(lanes))


def _resume(loop: StepLoop, path: Path, names: Sequence[str]) -> dict[str, int]:
    """Frames that were stepped before; none where there is no snapshot yet, as at a service's first start."""
    try:
        path.stat()
    except FileNotFoundError:
        log(f"{path}: no snapshot yet: starting from the beginning")
        return {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    snapshot = loop.restore(path)
    if len(names) == 1:
        log(f"{path}: going on at frame {snapshot.frame} of {snapshot.metadata.get('input', 'an unnamed input')}")
        return {names[0]: snapshot.frame}
    starts = saved_frames(snapshot)
    log(f"{path}: going on at " + ", ".join(f"frame {number} of {name}" for name, number in starts.items()))
    return starts
