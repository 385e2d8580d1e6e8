"""`stepcell events`: what an event file holds, as numbers, a picture or a clip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stepcell.cli.common import json_option, overwrite_option, parse_size
from stepcell.cli.console import log, print_json, table, working
from stepcell.errors import InputError, UsageError
from stepcell.files import human_size
from stepcell.overwrite import check_folder, check_output, is_marked

if TYPE_CHECKING:
    from stepcell.runtime.media.events.summary import EventSummary


@click.command(
    epilog="""\b
Examples:
  stepcell events recording.raw
  stepcell events recording.raw -o recording.png
  stepcell events recording.npz --size 346x260 --event-window 10ms -o recording.mp4 --json
"""
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--event-stream", "stream", metavar="NAME",
    help="Which of several streams of events: a topic of a rosbag, a number of AEDAT4, a group of HDF5.",
)  # fmt: skip
@click.option("--size", "size_text", metavar="WxH", help="Size of the sensor, if the file does not state it.")
@click.option(
    "--event-window", "window_text", default="30ms", show_default=True, metavar="TIME",
    help="Time of a panel of the picture, or of a frame of the clip.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="F",
    help="Write a picture (.png) of six windows and the events over time, or a clip (.mp4, .mkv, .mov): red where "
    "pixels became brighter, blue where darker.",
)  # fmt: skip
@overwrite_option
@json_option
def command(
    file: Path,
    stream: str | None,
    size_text: str | None,
    window_text: str,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Print what the event file FILE holds: format, sensor, events, rate, duration and bad events.

    A picture shows whether it is read right: edges of things, not noise. A file that is broken is described up to that
    place, with exit code 1.
    """
    from stepcell.event_spec import EventWindow
    from stepcell.runtime.media.events.summary import summarise_events
    from stepcell.runtime.media.open_sink import VIDEOS
    from stepcell.runtime.media.source import FRAME_RATES

    if str(file) == "-" or str(file).startswith("tcp:"):
        raise UsageError(
            f"{file}: a stream of events has no end to read to", hint="`stepcell run` takes it; or record it to a file"
        )
    size = parse_size(size_text) if size_text else None
    window = EventWindow.parse(window_text, subject="--event-window")
    if window.unit != "us":
        raise UsageError(f"--event-window: expected a time, got {window_text!r}", hint="such as 30ms")
    if output is not None:
        if output.suffix.lower() not in (".png", *VIDEOS):
            raise UsageError(f"--output: expected .png, {', '.join(VIDEOS)}, got {output}")
        if output.suffix.lower() != ".png" and 1_000_000 / window.size > FRAME_RATES[1]:
            raise UsageError(
                f"--event-window {window_text}: a clip has at most {FRAME_RATES[1]} frames a second, one a window",
                hint="give 1ms or more, or write a .png",
            )
        check_output(output, is_marked, reads={file: "the recording"}, overwrite=overwrite)
        check_folder(output)
    with working(f"reading {file}"):
        found = summarise_events(file, size, stream)
    if as_json:
        print_json(found)
    else:
        _print(found, stated=size is None)
    if output is not None:
        _draw(output, found, round(window.size))
    if found.broken:
        raise InputError(found.broken, hint="what is printed is the part before that place")


def _print(found: EventSummary, *, stated: bool) -> None:
    path = Path(found.file)
    bytes_ = f"  {human_size(path.stat().st_size)}" if path.is_file() else ""
    sensor = f"{found.width}x{found.height}, {'as the file says' if stated else 'of --size'}"
    if found.width is None:
        sensor = f"not stated; events reach ({found.largest_x}, {found.largest_y}), counted from 0"
    start, end, rate = found.start_us / 1e6, found.end_us / 1e6, found.events_per_second
    bad = [f"{count:,} {kind}" for kind, count in found.bad_events.items() if count]
    rows = [
        ["file", f"{found.file}{bytes_}"],
        ["format", found.format],
        ["sensor", sensor],
        ["events", f"{found.events:,}, {found.rising / found.events:.0%} of them rising"],
        ["time", f"{found.seconds:.6g} s, from {start:.6f} s to {end:.6f} s of its clock"],
        ["rate", "unknown: all have one time" if rate is None else f"{rate:,.0f} events/s"],
        ["bad events", ", ".join(bad) or "none"],
    ]
    table("", ["", ""], rows, to_stdout=True)


def _draw(output: Path, found: EventSummary, window: int) -> None:
    from stepcell.runtime.media.events.picture import write_event_clip, write_event_picture

    size = (found.width or found.largest_x + 1, found.height or found.largest_y + 1)
    with working(f"drawing {output}"):
        if output.suffix.lower() == ".png":
            starts = ", ".join(f"{start:.3g}" for start in write_event_picture(output, found, size, window))
            text = f"windows of {window / 1000:g} ms at {starts} s; below, rising and falling events over time"
        else:
            frames = write_event_clip(output, found, size, window)
            text = f"{frames} frames of {window / 1000:g} ms"
    log(f"{output}: {text}")
