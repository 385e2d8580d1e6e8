"""`stepcell run`: options for `run_streams`, signals, and what is printed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from stepcell.cli.clip_options import clip_options, no_nan, read_clip_options
from stepcell.cli.common import backend_option, json_option, leaving, overwrite_option
from stepcell.cli.console import log, print_json
from stepcell.cli.server_options import refuse_local, refuse_without_server, server_options
from stepcell.cli.signals import signal_control
from stepcell.cli.verified import check_verified
from stepcell.cli.view import View
from stepcell.errors import UsageError
from stepcell.runtime.streams.metrics import LOCALHOST, Metrics
from stepcell.runtime.streams.report import RunError, RunReport
from stepcell.runtime.streams.run import run_streams

__all__ = ["command", "parse_address"]


def parse_address(text: str) -> tuple[str, int]:
    """`9095` or `0.0.0.0:9095` as (address, port); the default address answers only this machine.

    Raises:
        UsageError: another form.
    """
    address, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise UsageError(f"--metrics-port: expected [ADDRESS:]PORT, got {text!r}", hint="such as 9095")
    return address.strip("[]") or LOCALHOST, int(port)


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
  stepcell run --server http://127.0.0.1:8000 --input clip.mp4 --output out.mp4
  decoder | stepcell run model.onnx --input - --size 640x480 --output - | encoder
"""
)
@click.argument("model", required=False)
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
@clip_options
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads for one step.  [default: one per core]")
@backend_option
@click.option(
    "--deadline-ms", type=click.FloatRange(0, min_open=True), callback=no_nan, metavar="MS",
    help="A frame of a camera, a URL or stdin is late if it waited longer than this.",
)  # fmt: skip
@click.option(
    "--on-late", type=click.Choice(["drop", "block"]), default="drop", show_default=True,
    help="Drop late frames, or step them while the source waits; both are counted.",
)  # fmt: skip
@click.option(
    "--reconnect", type=click.FloatRange(0), callback=no_nan, default=0, metavar="SECONDS",
    help="Reopen a lost camera or URL for this long after its last frame (inf: without limit).",
)  # fmt: skip
@server_options
@click.option(
    "--snapshot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Write the states to this .safetensors file periodically and at the end.",
)  # fmt: skip
@click.option("--snapshot-every", type=click.IntRange(1), metavar="N", help="Frames between snapshots.  [default: 250]")
@click.option("--resume", is_flag=True, help="Continue from --snapshot at the next frame, if the file exists.")
@click.option(
    "--metrics-port", "address_text", metavar="[ADDRESS:]PORT",
    help="Serve Prometheus metrics there.  [default address: 127.0.0.1]",
)  # fmt: skip
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write the report to this JSON file.")
@overwrite_option
@json_option
@leaving()
def command(
    model: str | None,
    server: str | None,
    server_wait: float,
    shared_memory: bool,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    address_text: str | None,
    require_verified: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run the step loop over one stream of frames or several.

    Frames are scaled, padded to the model's multiple and cropped back, as its contract says; --range, --mean, --std,
    --channels and --layout say it in its place. Ctrl-C stops after the current step, and outputs are finished as valid
    files. SIGUSR1 resets the states of every stream. With --server the frames are stepped on a server (docs/fleet.md).
    """
    if as_json and "-" in outputs:
        raise UsageError("--json and --output - both write to stdout", hint="--report FILE writes the report to a file")
    context = click.get_current_context()
    options = read_clip_options(options)
    address = parse_address(address_text) if address_text else None
    run: Callable[..., RunReport]
    if server is not None:
        from stepcell.runtime.remote.run_on_server import run_on_server

        refuse_local(context)
        local = ("device", "allow_fallback", "keep_float16", "threads", "backend", "check_file")
        options = {name: value for name, value in options.items() if name not in local}
        run = functools.partial(run_on_server, server, model, wait=server_wait, shared_memory=shared_memory)
    elif model is None:
        raise UsageError("MODEL: expected an .onnx file or an engine", hint="or --server URL for one on a server")
    else:
        refuse_without_server(context)
        check_verified(Path(model), options["device"], required=require_verified)
        run = functools.partial(run_streams, Path(model))
    error: RunError | None = None
    with signal_control() as control, contextlib.ExitStack() as stack:
        if address is not None:
            options["metrics"] = metrics = stack.enter_context(Metrics(address[1], address[0]))
            log(f"metrics: http://{metrics.address}:{metrics.port}/metrics")
        view = View()
        try:
            with view:
                report = run(inputs, outputs, progress=view, control=control, **options)
        except RunError as failed:
            report, error = failed.report, failed
        view.summarise(report)
        if as_json:
            print_json(report.document)
        if error is not None:
            raise error
    if control.signal is not None:
        raise click.exceptions.Exit(128 + control.signal)
