"""`stepcell run --server`: its outputs beside those of a local run, while the server is killed in between."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tools.fleet.outcome import Outcome
from tools.fleet.servers import SERVER, STUB, serving, write_repository

__all__ = ["run_on_server"]

SIZE = (144, 176)  # (height, width)
COUNTS = (160, 120)  # frames of each clip
EVERY = 10  # frames between two snapshots
KILL_AT = 55  # frames of a stream: between two snapshots, so that frames are sent again
SECONDS = 300.0


def run_on_server(model: Path, folder: Path, port: int, log: Path) -> Outcome:
    """Two clips as two inputs of one run, by HTTP, by gRPC, and with shared memory; the server is killed in each."""
    outcome = Outcome(
        "run --server, its server killed in the middle",
        "outputs are those of a local run, byte by byte; what happened is in report and metrics",
    )
    clips = [_clip(folder / f"clip{number}.mkv", number, count) for number, count in enumerate(COUNTS)]
    here = _outputs(folder, "here")
    subprocess.run([*_run(model, "--backend", "onnxruntime"), *_pairs(clips, here)], check=True, capture_output=True)
    options = ("--slots", 2, "--snapshots", folder / "run-snapshots", "--snapshot-every", EVERY)
    repository = write_repository(model, folder / "run-repository", *options)
    seen: list[str] = []
    equal = 0
    with serving(repository, port, log) as server:
        ways: dict[str, tuple[str, ...]] = {
            "http": (server.url,),
            "grpc": (f"grpc://127.0.0.1:{server.grpc}",),
            "shared memory": (server.url, "--shared-memory"),
        }
        for way, (url, *more) in ways.items():
            there = _outputs(folder, way.replace(" ", "-"))
            metrics = port + 5
            command = [*_run("--server", url, *more, "--json", "--metrics-port", metrics), *_pairs(clips, there)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            reached = _wait_for(metrics, KILL_AT, process)
            outcome.require(reached, f"{way}: the metrics do not show {KILL_AT} frames")
            killed = [server.kill(STUB), server.kill(SERVER)]  # a stub that outlives the server writes its states
            outcome.require(killed == [1, 1], f"{way}: killed {killed}")
            out, errors = process.communicate(timeout=SECONDS)
            outcome.require(process.returncode == 0, f"{way}: exit code {process.returncode}: {errors[-500:]}")
            if process.returncode:
                continue
            streams = json.loads(out)["streams"]
            for one, other, count, report in zip(here, there, COUNTS, streams, strict=True):
                same = one.read_bytes() == other.read_bytes()
                equal += same
                outcome.require(same, f"{way}: {other.name} differs")
                outcome.require(report["frames"] == count, f"{way}: {report['frames']} of {count} frames")
                events = report["server_events"]
                outcome.require(events["unreachable"] > 0, f"{way}: {events}")
            replayed = sum(stream["server_events"]["replayed"] for stream in streams)
            outcome.require(replayed > 0, f"{way}: no frame was sent again")
            seen.append(f"{way}: {[stream['server_events'] for stream in streams]}")
        left = [path.name for path in Path("/dev/shm").glob("stepcell-client-*")]
        outcome.require(not left, f"left in /dev/shm: {left}")
    outcome.seen = (
        f"{equal} of {len(ways) * len(COUNTS)} outputs equal, {sum(COUNTS)} frames each time; {'; '.join(seen)}"
    )
    return outcome


def _run(*words: object) -> list[str]:
    return [sys.executable, "-m", "stepcell", "run", *map(str, words)]


def _pairs(clips: list[Path], outputs: list[Path]) -> list[str]:
    pairs = zip(clips, outputs, strict=True)
    return [word for clip, output in pairs for word in ("--input", str(clip), "--output", str(output))]


def _outputs(folder: Path, name: str) -> list[Path]:
    (folder / name).mkdir()
    return [folder / name / f"{number}.mp4" for number in range(len(COUNTS))]


def _clip(path: Path, seed: int, count: int) -> Path:
    """A lossless clip of a pattern that moves."""
    picture = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(25))
        stream.height, stream.width, stream.pix_fmt = *SIZE, "bgr0"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 3 * number, axis=1), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _wait_for(port: int, frames: int, process: subprocess.Popen[str]) -> bool:
    """Until the metrics of a run say that a stream has so many frames."""
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except (OSError, urllib.error.URLError):
            lines = []
        counts = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("stepcell_frames_total")]
        if max(counts, default=0) >= frames:
            return True
        time.sleep(0.05)
    return False
