"""Options of `run_streams` that `stepcell run` and `stepcell map` share: how clips are read, stepped and written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

import click

from stepcell.cli.common import no_check_option, parse_size
from stepcell.cli.pixel_options import pixel_options, pop_pixels
from stepcell.errors import UsageError
from stepcell.runtime.media.source import FRAME_RATES

__all__ = ["clip_options", "no_nan", "parse_rate", "read_clip_options"]

_F = TypeVar("_F", bound=Callable[..., Any])


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


def no_nan(_ctx: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    """Callback of an option with a number."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("expected a number, got nan")
    return value


_OPTIONS = (
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N; an error if not available."),
    click.option("--allow-fallback", is_flag=True, help="Run on the CPU if CUDA does not load, with a warning."),
    click.option("--keep-float16", is_flag=True, help="Run a float16 model in float16 on a CPU too (slower)."),
    click.option("--fps", "fps_text", metavar="N", help="Frame rate of the output.  [default: the input's, else 25]"),
    click.option(
        "--timestamps", type=click.Choice(["keep", "constant"]),
        help="Timing of an output video: that of the input, or a constant rate.  [default: keep for cameras and URLs]",
    ),
    click.option("--audio", type=click.Choice(["copy"]), help="Copy the sound of a file into the output video."),
    click.option(
        "--reset-every", type=click.IntRange(1), metavar="N", help="Reset the states before every N-th frame.",
    ),
    click.option(
        "--reset-gap", type=click.FloatRange(0, min_open=True), callback=no_nan, metavar="SECONDS",
        help="Reset the states if two frames are further apart than this.",
    ),
    click.option("--reset-on-cut", is_flag=True, help="Reset the states at a scene cut."),
    click.option(
        "--on-nonfinite", type=click.Choice(["stop", "reset", "ignore"]), default="stop", show_default=True,
        help="On NaN or Inf in a frame, an output or a state: end the stream, reset its states and go on, or do not "
        "check.",
    ),
    click.option(
        "--on-size-change", type=click.Choice(["stop", "reset"]), default="stop", show_default=True,
        help="At a frame of another size: end the stream, or reset its states and go on.",
    ),
    click.option(
        "--resize", is_flag=False, flag_value="stretch", metavar="[WxH][,fit]",
        help="Resize the frames, without a size to that of the model: stretched, or fitted in with black bars. "
        "Outputs are not scaled back.",
    ),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Stop each stream after N frames."),
    click.option("--size", "size_text", metavar="WxH", help="Size of raw frames on stdin, or of an event camera."),
    pixel_options,
    click.option(
        "--event-window", metavar="WINDOW",
        help="Events of one step: 30ms, 15000events or 0.35events/pixel.  [default: the contract's]",
    ),
    click.option(
        "--on-bad-event", type=click.Choice(["stop", "drop", "clamp"]), default="stop", show_default=True,
        help="At an event outside the sensor or earlier than the one before: end the stream, leave the event out, or "
        "move it onto the sensor and to the time before. All are counted.",
    ),
    click.option(
        "--event-stream", metavar="NAME",
        help="Which of several streams of events of a file: a topic of a rosbag, a number of AEDAT4, a group of HDF5.",
    ),
    click.option(
        "--require-verified", is_flag=True,
        help="Refuse an engine that `stepcell verify` has not passed on this device with this driver.",
    ),
    no_check_option,
)  # fmt: skip


def clip_options(command: _F) -> _F:
    """Add these options to a command; `read_clip_options` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_clip_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command with those of its options that are text as `run_streams` takes them.

    Raises:
        UsageError: a malformed value.
    """
    read = dict(options)
    size, fps = read.pop("size_text"), read.pop("fps_text")
    read["pixels"] = pop_pixels(read)
    read["size"] = parse_size(size) if size else None
    read["fps"] = parse_rate(fps) if fps else None
    return read
