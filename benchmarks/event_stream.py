"""A named pipe that is fed with EVT 3.0 of a 1280x720 camera: the rate reached, and memory over time.

    python benchmarks/event_stream.py                        # 20 million events a second for a minute
    python benchmarks/event_stream.py --rate 50e6 --count-only

One process writes the pipe, paced by the clock. This one reads it as `stepcell run` does, up to the tensors of windows
by time, and writes benchmarks/results/event_stream.json. If the reader is slower than asked, the writer waits and
memory is flat all the same; the rate that was reached tells.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
BLOCK = 10 * 4096  # microseconds that are written at once


def main() -> None:
    """Feed, read, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=20e6, help="events a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--window", default="30ms")
    parser.add_argument("--normalise", action="store_true", help="normalise the tensors, as for E2VID")
    parser.add_argument("--count-only", action="store_true", help="decode and check, without tensors")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/event_stream.json")
    parser.add_argument("--feed", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.feed:
        feed(arguments.feed, arguments.rate, arguments.seconds)
        return
    with tempfile.TemporaryDirectory() as name:
        pipe = Path(name) / "camera"
        os.mkfifo(pipe)
        options = ["--feed", str(pipe), "--rate", str(arguments.rate), "--seconds", str(arguments.seconds)]
        with subprocess.Popen([sys.executable, __file__, *options]) as feeder:
            result = read(pipe, arguments.window, normalise=arguments.normalise, count_only=arguments.count_only)
            feeder.wait()
    result |= {"rate asked": arguments.rate, "window": arguments.window, "tensors": not arguments.count_only}
    result["normalised"] = arguments.normalise
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps({key: value for key, value in result.items() if key != "each second"}) + "\n")


def feed(pipe: Path, rate: float, seconds: float) -> None:
    """Write blocks, each at its time."""
    from event_recordings import SIZE, evt3_block

    words, places = evt3_block(int(rate * BLOCK / 1e6), BLOCK)
    upper = words[places] & 0xFFF
    with pipe.open("wb", buffering=0) as file:
        file.write(f"% evt 3.0\n% geometry {SIZE[0]}x{SIZE[1]}\n% end\n".encode())
        started = time.monotonic()
        for number in range(int(seconds * 1e6 / BLOCK)):
            words[places] = 8 << 12 | (upper + number * (BLOCK >> 12) & 0xFFF)
            data = memoryview(words.tobytes())
            while data:
                data = data[file.write(data) :]
            if (early := started + (number + 1) * BLOCK / 1e6 - time.monotonic()) > 0:
                time.sleep(early)


def read(pipe: Path, window: str, *, normalise: bool, count_only: bool) -> dict[str, Any]:
    """Read the stream to its end; events, windows and memory of each second."""
    from stepcell.event_spec import EventSpec, EventWindow
    from stepcell.runtime.media.events import stream_source
    from stepcell.runtime.media.events.stream_source import open_event_stream

    counted = [0]
    tensors = stream_source.event_tensor

    def counting(events: Any, *more: Any) -> Any:
        counted[0] += len(events)
        return np.empty(0) if count_only else tensors(events, *more)

    stream_source.event_tensor = counting
    spec = EventSpec(representation="voxel_grid", bins=5, window=EventWindow.parse(window), normalise=normalise)
    stream = open_event_stream(str(pipe), spec, None, "stop")
    seconds: list[dict[str, float]] = []
    windows, started, processor = 0, 0.0, 0.0
    for _ in stream:
        now = time.monotonic()
        if not windows:
            counted[0], started, processor = 0, now, time.process_time()
        windows += 1
        if now - started >= len(seconds) + 1:
            seconds.append({"seconds": round(now - started, 1), "events": counted[0], "MiB": resident()})
    elapsed = time.monotonic() - started
    stream.close()
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "events": counted[0],
        "windows": windows,
        "seconds": round(elapsed, 2),
        "events per second": round(counted[0] / elapsed),
        "processor seconds": round(time.process_time() - processor, 2),
        "MiB after 10 seconds": seconds[min(9, len(seconds) - 1)]["MiB"] if seconds else resident(),
        "MiB at most": max((each["MiB"] for each in seconds), default=resident()),
        "MiB at the end": resident(),
        "each second": seconds,
    }


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


if __name__ == "__main__":
    main()
