"""Soak test: memory and counters of `stepcell run` over many steps, configured as in a deployment.

Two emulated cameras send a real clip as MPEG-TS over TCP at a fixed rate, disconnect once a minute and are reconnected
to. `stepcell run` steps them together, with a deadline, resets, snapshots, video outputs and metrics. Its resident
memory and counters are read over HTTP, the memory of a GPU from nvidia-smi. At the end it receives SIGTERM, and the
frames in its outputs are compared with its counters.

    python benchmarks/soak.py --fps 25 --output benchmarks/results/soak.json --plot docs/images/soak.png
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families

from stepcell import open_source
from stepcell.exporter import export_onnx
from stepcell.models.zoo.clips import read_clip
from stepcell.models.zoo.denoiser import Denoiser

STEPCELL = (sys.executable, "-c", "from stepcell.cli import main; main()")
WARM_UP = 180.0  # seconds before memory is evaluated: every camera has been lost and reopened by then
EVERY = 5.0  # seconds between two samples
CONNECTION = 60  # seconds until a camera disconnects


class Camera:
    """A camera that sends the clip in a loop over TCP, frame by frame at its rate."""

    def __init__(self, fps: int) -> None:
        self._fps = fps
        self._packets = _packets(fps)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection, contextlib.suppress(OSError):
                started = time.monotonic()
                for number, packet in enumerate(self._packets):
                    time.sleep(max(0.0, started + number / self._fps - time.monotonic()))
                    connection.sendall(packet)


def _packets(fps: int) -> list[bytes]:
    """Data to send per frame: equal parts of the recording, split between packets of the transport stream."""
    clip = read_clip("carphone_pristine")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=fps)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for number in range(CONNECTION * fps):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(clip[number % len(clip)], "rgb24")))
        container.mux(stream.encode(None))
    whole = buffer.getvalue()
    ends = np.linspace(0, len(whole) // 188, CONNECTION * fps + 1).astype(int) * 188
    return [whole[start:end] for start, end in itertools.pairwise(ends)]


def scrape(port: int) -> dict[str, float]:
    """Every sample by its name, followed by the values of its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {"/".join([s.name, *s.labels.values()]): s.value for family in families for s in family.samples}


def device_memory() -> float | None:
    """MiB in use on the first GPU; None: there is none."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[0])
    return None


def sample(port: int, started: float) -> dict[str, Any]:
    """One row of the time series."""
    found = scrape(port)

    def total(name: str) -> int:
        return int(sum(value for key, value in found.items() if key.startswith(name + "/")))

    return {
        "seconds": round(time.monotonic() - started, 2),
        "resident_mib": round(found["process_resident_memory_bytes"] / 2**20, 3),
        "device_mib": device_memory(),
        "open_files": int(found["process_open_fds"]),
        "frames": total("stepcell_frames_total"),
        "dropped": total("stepcell_dropped_frames_total"),
        "reconnects": total("stepcell_reconnects_total"),
        "resets": total("stepcell_resets_total"),
        "queued": total("stepcell_queued_frames"),
    }


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the test and return its results."""
    torch.manual_seed(0)
    model, video, report = folder / "denoiser.onnx", folder / "out.mkv", folder / "run.json"
    export_onnx(Denoiser(hidden=8).eval(), model, family="denoiser", precision="float32")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cameras = [Camera(options.fps) for _ in range(2)]
    command = [*STEPCELL, "run", str(model), "--device", options.device, "--threads", "1"]
    for camera in cameras:
        command += ["--input", camera.url]
    command += ["--output", str(video), "--output", str(folder / "out2.mkv"), "--report", str(report)]
    command += ["--reconnect", "inf", "--deadline-ms", "200", "--reset-every", "5000", "--on-nonfinite", "reset"]
    command += ["--snapshot", str(folder / "state.safetensors"), "--snapshot-every", "1000"]
    command += ["--metrics-port", str(port)]
    series = []
    with (folder / "log.txt").open("wb") as errors, subprocess.Popen(command, stderr=errors) as process:
        started = time.monotonic()
        while time.monotonic() - started < options.minutes * 60 and process.poll() is None:
            time.sleep(EVERY)
            with contextlib.suppress(urllib.error.URLError):  # the model is still loading
                series.append(sample(port, started))
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    streams = json.loads(report.read_text())["streams"]
    written = [sum(1 for _ in open_source(stream["output"])) for stream in streams]
    return {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "backend": streams[0]["backend"],
        "minutes": options.minutes,
        "fps": options.fps,
        "exit_code": code,
        "frames": [stream["frames"] for stream in streams],
        "frames_written": written,
        "dropped": [stream["dropped"] for stream in streams],
        "reconnects": [stream["reconnects"] for stream in streams],
        "resets": [stream["resets"] for stream in streams],
        "latency_ms": [stream["latency"] for stream in streams],
        "step_ms": streams[0]["step"],
        **growth(series),
        "series": series,
    }


def growth(series: list[dict[str, Any]]) -> dict[str, float]:
    """Growth of the resident memory after the warm-up."""
    warm = [row for row in series if row["seconds"] >= min(WARM_UP, series[-1]["seconds"] / 2)]
    seconds, resident = (np.array([row[key] for row in warm]) for key in ("seconds", "resident_mib"))
    slope = float(np.polyfit(seconds, resident, 1)[0])
    return {
        "resident_after_warm_up_mib": float(resident[0]),
        "resident_at_the_end_mib": float(resident[-1]),
        "resident_largest_mib": float(resident.max()),
        "slope_mib_per_hour": round(slope * 3600, 3),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot memory and frames over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    series = result["series"]
    minutes = [row["seconds"] / 60 for row in series]
    figure, axes = plt.subplots(figsize=(7, 3), dpi=110)
    axes.plot(minutes, [row["resident_mib"] for row in series], color="tab:blue")
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, result["resident_largest_mib"] * 1.2))
    right = axes.twinx()
    right.plot(minutes, [row["frames"] for row in series], color="tab:grey", linestyle="--")
    right.set(ylabel="frames stepped (dashed)", ylim=(0, None))
    axes.set_title(f"two cameras, {result['fps']} frames/s each, {result['backend']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--fps", type=int, default=50, help="of each camera")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--plot", type=Path, help="PNG")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(options, Path(folder))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(result, options.plot)
    print(json.dumps({key: value for key, value in result.items() if key != "series"}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
