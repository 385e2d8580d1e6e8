"""`stepcell run`: options for `run_streams`, signals, and what is printed."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from stepcell.cli.common import json_option, leaving, no_check_option, overwrite_option, parse_size
from stepcell.cli.console import log, print_json
from stepcell.cli.pixel_options import pixel_options, pop_pixels
from stepcell.cli.signals import signal_control
from stepcell.cli.verified import check_verified
from stepcell.cli.view import View
from stepcell.errors import UsageError
from stepcell.runtime.media.source import FRAME_RATES
from stepcell.runtime.streams.metrics import LOCALHOST, Metrics
from stepcell.runtime.streams.report import RunError
from stepcell.runtime.streams.run import run_streams

__all__ = ["command", "parse_address", "parse_rate"]


def parse_rate(text: str) -> Fraction:
    """`25`, `29.97` or `30000/1001` frames per second.

    Raises:
        UsageError: another form, or outside 0.001 to 1000.
    """
    try:  # no exponents: 1e99999999 would take hours to expand
        rate = Fraction(text) if "e" not in text.lower() and len(text) <= 40 else Fraction(0)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not FRAME_RATES[0] <= rate <= FRAME_RATES[1]:
        raise UsageError(f"--fps: expected frames per second such as 25, 29.97 or 30000/1001, got {text!r}")
    return rate


def parse_address(text: str) -> tuple[str, int]:
    """`9095` or `0.0.0.0:9095` as (address, port); the default address answers only this machine.

    Raises:
        UsageError: another form.
    """
    address, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise UsageError(f"--metrics-port: expected [ADDRESS:]PORT, got {text!r}", hint="such as 9095")
    return address.strip("[]") or LOCALHOST, int(port)


def _no_nan(_ctx: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):
        raise click.BadParameter("expected a number, got nan")
    return value


@click.command(
    epilog="""\b
Examples:
  stepcell run model.onnx --input clip.mp4 --output out.mp4
  stepcell run model.onnx --input frames --output denoised
  stepcell run model.onnx --input 'clips/*.mp4' --output denoised
  stepcell run model.onnx --input clip.mp4 --output small.mp4 --resize 640x360,fit --audio copy
  stepcell run model.onnx --input clip.mp4 --limit 100 --json
  stepcell run model.onnx --input a.mp4 --input b.mp4 --output a-out.mp4 --output b-out.mp4
  stepcell run model.engine --device cuda --input camera:0 --output out.mp4
  stepcell run model.onnx --input rtsp://host/door --reconnect inf --deadline-ms 100 --metrics-port 9095
  stepcell run model.onnx --input camera:0 --snapshot state.safetensors --resume
  stepcell run firenet.onnx --input events.dat --event-window 30ms --output out.mp4
  decoder | stepcell run model.onnx --input - --size 640x480 --output - | encoder
"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-i", "--input", "inputs", required=True, multiple=True, metavar="SOURCE",
    help="Video file or URL, folder of pictures or of clips, .npy, camera:N, or - for raw rgb24 frames on stdin; "
    "for a model of events an event file, such as .dat, .raw, .aedat4, .h5, .bag or .csv, or RAW and DAT from "
    "-, a named pipe or tcp://HOST:PORT. Several inputs share one batched step.",
)  # fmt: skip
@click.option(
    "-o", "--output", "outputs", multiple=True, metavar="SINK",
    help=".mp4/.mkv/.mov, .npy (output tensors), a new folder of .png, or - for raw frames on stdout; "
    "one for each input. Without it the frames are only stepped, as a benchmark.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N; an error if not available.")
@click.option("--allow-fallback", is_flag=True, help="Run on the CPU if CUDA does not load, with a warning.")
@click.option("--keep-float16", is_flag=True, help="Run a float16 model in float16 on a CPU too (slower).")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads for one step.  [default: one per core]")
@click.option("--fps", "fps_text", metavar="N", help="Frame rate of the output.  [default: the input's, else 25]")
@click.option(
    "--timestamps", type=click.Choice(["keep", "constant"]),
    help="Timing of an output video: that of the input, or a constant rate.  [default: keep for cameras and URLs]",
)  # fmt: skip
@click.option("--audio", type=click.Choice(["copy"]), help="Copy the sound of a file into the output video.")
@click.option(
    "--deadline-ms", type=click.FloatRange(0, min_open=True), callback=_no_nan, metavar="MS",
    help="A frame of a camera, a URL or stdin is late if it waited longer than this.",
)  # fmt: skip
@click.option(
    "--on-late", type=click.Choice(["drop", "block"]), default="drop", show_default=True,
    help="Drop late frames, or step them while the source waits; both are counted.",
)  # fmt: skip
@click.option(
    "--reconnect", type=click.FloatRange(0), callback=_no_nan, default=0, metavar="SECONDS",
    help="Reopen a lost camera or URL for this long after its last frame (inf: without limit).",
)  # fmt: skip
@click.option("--reset-every", type=click.IntRange(1), metavar="N", help="Reset the states before every N-th frame.")
@click.option(
    "--reset-gap", type=click.FloatRange(0, min_open=True), callback=_no_nan, metavar="SECONDS",
    help="Reset the states if two frames are further apart than this.",
)  # fmt: skip
@click.option("--reset-on-cut", is_flag=True, help="Reset the states at a scene cut.")
@click.option(
    "--on-nonfinite", type=click.Choice(["stop", "reset", "ignore"]), default="stop", show_default=True,
    help="On NaN or Inf in a frame, an output or a state: end the stream, reset its states and go on, or do not check.",
)  # fmt: skip
@click.option(
    "--on-size-change", type=click.Choice(["stop", "reset"]), default="stop", show_default=True,
    help="At a frame of another size: end the stream, or reset its states and go on.",
)  # fmt: skip
@click.option(
    "--resize", is_flag=False, flag_value="stretch", metavar="[WxH][,fit]",
    help="Resize the frames, without a size to that of the model: stretched, or fitted in with black bars. "
    "Outputs are not scaled back.",
)  # fmt: skip
@click.option(
    "--snapshot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Write the states to this .safetensors file periodically and at the end.",
)  # fmt: skip
@click.option("--snapshot-every", type=click.IntRange(1), metavar="N", help="Frames between snapshots.  [default: 250]")
@click.option("--resume", is_flag=True, help="Continue from --snapshot at the next frame, if the file exists.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Stop each stream after N frames.")
@click.option("--size", "size_text", metavar="WxH", help="Size of raw frames on stdin, or of an event camera.")
@pixel_options
@click.option(
    "--event-window", metavar="WINDOW",
    help="Events of one step: 30ms, 15000events or 0.35events/pixel.  [default: the contract's]",
)  # fmt: skip
@click.option(
    "--on-bad-event", type=click.Choice(["stop", "drop", "clamp"]), default="stop", show_default=True,
    help="At an event outside the sensor or earlier than the one before: end the stream, leave the event out, or move "
    "it onto the sensor and to the time before. All are counted.",
)  # fmt: skip
@click.option(
    "--event-stream", metavar="NAME",
    help="Which of several streams of events of a file: a topic of a rosbag, a number of AEDAT4, a group of HDF5.",
)  # fmt: skip
@click.option(
    "--metrics-port", "address_text", metavar="[ADDRESS:]PORT",
    help="Serve Prometheus metrics there.  [default address: 127.0.0.1]",
)  # fmt: skip
@click.option(
    "--require-verified", is_flag=True,
    help="Refuse an engine that `stepcell verify` has not passed on this device with this driver.",
)  # fmt: skip
@no_check_option
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write the report to this JSON file.")
@overwrite_option
@json_option
@leaving()
def command(
    model: Path,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    fps_text: str | None,
    size_text: str | None,
    address_text: str | None,
    require_verified: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run the step loop over one stream of frames or several.

    Frames are scaled, padded to the model's multiple and cropped back, as its contract says; --range, --mean, --std,
    --channels and --layout say it in its place. Ctrl-C stops after the current step, and outputs are finished as valid
    files. SIGUSR1 resets the states of every stream.
    """
    if as_json and "-" in outputs:
        raise UsageError("--json and --output - both write to stdout", hint="--report FILE writes the report to a file")
    options["pixels"] = pop_pixels(options)
    options["size"] = parse_size(size_text) if size_text else None
    options["fps"] = parse_rate(fps_text) if fps_text else None
    address = parse_address(address_text) if address_text else None
    check_verified(model, options["device"], required=require_verified)
    error: RunError | None = None
    with signal_control() as control, contextlib.ExitStack() as stack:
        if address is not None:
            options["metrics"] = metrics = stack.enter_context(Metrics(address[1], address[0]))
            log(f"metrics: http://{metrics.address}:{metrics.port}/metrics")
        view = View()
        try:
            with view:
                report = run_streams(model, inputs, outputs, progress=view, control=control, **options)
        except RunError as failed:
            report, error = failed.report, failed
        view.summarise(report)
        if as_json:
            print_json(report.document)
        if error is not None:
            raise error
    if control.signal is not None:
        raise click.exceptions.Exit(128 + control.signal)
