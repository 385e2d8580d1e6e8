"""What happens around a run: other writers, cameras that come and go, a clock that is set."""

from __future__ import annotations

import contextlib
import io
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

from tools.torture.common import ENOUGH, ENVIRONMENT, Inputs, Outcome, command, count, hidden

# Two hours forward or back at every third reading of the time of day.
SETS_CLOCK = """
import itertools, time
real, readings = time.time, itertools.count()
time.time = lambda: real() + (0, 7200, -7200)[next(readings) // 3 % 3]
time.time_ns = lambda: int(time.time() * 1e9)
from stepcell.cli import main
main()
"""


def two_writers(inputs: Inputs, folder: Path, times: int) -> Outcome:
    """Two processes with the same output, report and snapshot at the same time."""
    outcome = Outcome("two writers", "both end in words; the output is one whole result, and no result is deleted")
    folder.mkdir()
    whole = np.load(inputs.whole)
    both = 0
    for number in range(times):
        place = folder / str(number)
        place.mkdir()
        output = place / ("out.npy", "out.mkv", "out")[number % 3]
        files = ("-o", output, "--report", place / "r.json", "--snapshot", place / "s.safetensors")
        arguments = command("run", inputs.model, "--threads", 1, "-i", inputs.clip, *files)
        children = [
            subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True)
            for _ in range(2)
        ]
        said = [child.communicate(timeout=ENOUGH)[1] for child in children]
        codes = [child.returncode for child in children]
        both += codes == [0, 0]
        outcome.require(0 in codes, f"{number}: exit {codes}: {' '.join(said[0].split())[-200:]}")
        outcome.require(not any("Traceback" in text for text in said), f"{number}: a traceback")
        outcome.require(all(code in (0, 1, 2) for code in codes), f"{number}: exit {codes}")
        frames = count(output)
        outcome.require(frames == len(whole), f"{number}: {output.name} has {frames} frames")
        if output.suffix == ".npy":
            outcome.require(np.array_equal(np.load(output), whole), f"{number}: {output.name} has other values")
        outcome.require(not hidden(place), f"{number}: left behind: {hidden(place)}")
    outcome.tried = times
    outcome.seen = f"{both} times both wrote, otherwise one was refused"
    return outcome


class Camera:
    """A camera that sends a clip over TCP and is lost at a random place of it, again and again."""

    def __init__(self, rng: random.Random, *, lost: bool) -> None:
        buffer = io.BytesIO()
        frames = np.random.default_rng(1).integers(0, 256, (75, 32, 32, 3), np.uint8)
        with av.open(buffer, "w", format="mpegts") as container:
            stream: Any = container.add_stream("mpeg2video", rate=25)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(stream.encode(None))
        self._data, self._rng, self._lost = buffer.getvalue(), rng, lost
        self._server = socket.create_server(("127.0.0.1", 0))
        self.connections = 0
        self.url = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        piece = 188 * 7
        while True:
            connection, _ = self._server.accept()
            self.connections += 1
            end = self._rng.randrange(len(self._data)) if self._lost else len(self._data)
            with connection, contextlib.suppress(OSError):
                for first in range(0, end, piece):
                    connection.sendall(self._data[first : min(first + piece, end)])
                    time.sleep(3.0 * piece / len(self._data))


def lost_cameras(inputs: Inputs, folder: Path, seconds: float, rng: random.Random) -> Outcome:
    """Two cameras that are lost anywhere in their stream."""
    outcome = Outcome(
        "lost cameras", "reconnects and counts it; SIGTERM: exit 143, every counted frame is in the output"
    )
    return _live(outcome, inputs, folder, seconds, [Camera(rng, lost=True) for _ in range(2)], ())


def set_clock(inputs: Inputs, folder: Path, seconds: float, rng: random.Random) -> Outcome:
    """The time of day jumps by hours while a camera runs."""
    promised = "no reset, no late frame and no reconnection because of it; every counted frame is in the output"
    camera = Camera(rng, lost=False)
    options = ("--reset-gap", 60, "--deadline-ms", 5000)
    outcome = _live(
        Outcome("clock set by hours", promised),
        inputs,
        folder,
        seconds,
        [camera],
        options,
        (sys.executable, "-c", SETS_CLOCK),
    )
    for stream in _streams(folder):
        outcome.require(stream["dropped"]["late"] == 0, f"{stream['dropped']} frames dropped")
        outcome.require(stream["resets"]["gap"] <= stream["reconnects"], f"resets: {stream['resets']}")
        outcome.require(stream["reconnects"] <= camera.connections, f"{stream['reconnects']} reconnects")
    return outcome


def _live(
    outcome: Outcome,
    inputs: Inputs,
    folder: Path,
    seconds: float,
    cameras: list[Camera],
    options: tuple[object, ...],
    python: tuple[str, ...] | None = None,
) -> Outcome:
    folder.mkdir()
    outputs = [folder / f"{number}.mkv" for number in range(len(cameras))]
    arguments: list[object] = ["run", inputs.model, "--threads", 1, "--reconnect", "inf", "--report", folder / "r.json"]
    for camera, output in zip(cameras, outputs, strict=True):
        arguments += ["-i", camera.url, "-o", output]
    words = command(*arguments, *options)
    if python is not None:
        words = [*python, *map(str, arguments), *map(str, options)]
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as child:
        time.sleep(seconds)
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=ENOUGH)[1]
    outcome.require(child.returncode == 143, f"exit {child.returncode}: {' '.join(said.split())[-300:]}")
    streams = _streams(folder)
    for stream, output in zip(streams, outputs, strict=True):
        frames = count(output)
        outcome.require(frames == stream["frames"], f"{output.name}: {frames} frames, reported {stream['frames']}")
        outcome.require(stream["frames"] > 0, f"{output.name}: no frames")
    outcome.tried = sum(camera.connections for camera in cameras)
    outcome.seen = f"{sum(s['frames'] for s in streams)} frames, {sum(s['reconnects'] for s in streams)} reconnects"
    return outcome


def _streams(folder: Path) -> list[dict[str, Any]]:
    """The report of every stream; that of a single one is the whole document."""
    report = json.loads((folder / "r.json").read_text())
    streams: list[dict[str, Any]] = report.get("streams", [report])
    return streams
