"""`stepcell map` over 40 small clips against `stepcell run` over the same folder, the zoo's denoiser on a CPU.

    python benchmarks/map.py
    python benchmarks/map.py --quick

Whole commands are timed, with their start, in interleaved rounds; ratios are taken within rounds. All must write the
same bytes. Writes benchmarks/results/map.json and map.svg, and needs the extras `demo` and `ort`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any

import onnxruntime

from stepcell import __version__
from stepcell.models.zoo.clips import HELD_OUT, read_clip
from stepcell.runtime.media.video_writer import VideoSink

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "models/zoo/denoiser.safetensors"
BASELINE, TARGET = "run, one process", "map, 2 workers"
COMMANDS = {
    BASELINE: ["run", "--backend", "onnxruntime"],
    "run, one process, one thread": ["run", "--backend", "onnxruntime", "--threads", "1"],
    "map, 1 worker": ["map", "--workers", "1"],
    TARGET: ["map", "--workers", "2"],
}
_LABEL, _WIDTH, _ROW = 230, 420, 24


def main() -> None:
    """Time the commands, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--frames", type=int, default=24, help="of each clip")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="shows that it works, not how fast anything is")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/map.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clips, arguments.frames, arguments.rounds = 2, 2, 1
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "denoiser.onnx"
        stepcell("export", CHECKPOINT, "-o", model)
        size = write_clips(folder / "clips", arguments.clips, arguments.frames)
        seconds: dict[str, list[float]] = {command: [] for command in COMMANDS}
        digests = set()
        for number in range(arguments.rounds):
            order = list(COMMANDS.items())
            for command, words in order[number % len(order) :] + order[: number % len(order)]:
                started = time.perf_counter()
                stepcell(words[0], model, "-i", folder / "clips", "-o", folder / "out", *words[1:])
                seconds[command].append(round(time.perf_counter() - started, 3))
                digests.add(digest(folder / "out"))
                shutil.rmtree(folder / "out")
    if len(digests) != 1:
        sys.exit(f"the outputs differ: {len(digests)} digests")
    result = {
        "stepcell": __version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load,
        "load_after": os.getloadavg(),
        "clips": arguments.clips,
        "frames": arguments.clips * arguments.frames,
        "size": size,
        "digest": digests.pop(),
        "seconds": seconds,
        "times as fast": {
            command: [round(one / other, 3) for one, other in zip(seconds[BASELINE], times, strict=True)]
            for command, times in seconds.items()
        },
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    arguments.output.with_suffix(".svg").write_text(svg(result))
    for command, factors in result["times as fast"].items():
        sys.stdout.write(f"{command}: {statistics.median(factors):.2f} times as fast as {BASELINE}\n")


def stepcell(*arguments: object) -> None:
    """Run a command, which must succeed."""
    command = [sys.executable, "-m", "stepcell", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def write_clips(folder: Path, count: int, frames: int) -> tuple[int, int]:
    """Write pieces of a real clip as videos; returns (width, height)."""
    folder.mkdir()
    pictures = read_clip(HELD_OUT)
    for number in range(count):
        start = number * (len(pictures) - frames) // count
        sink = VideoSink(folder / f"{number:02d}.mp4", Fraction(25))
        for frame in pictures[start : start + frames]:
            sink.write(frame)
        sink.close()
    return pictures[0].shape[1], pictures[0].shape[0]


def digest(folder: Path) -> str:
    """SHA-256 of the videos of a folder, in the order of their names."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.mp4")):
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def cpu() -> str:
    """The model of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def svg(result: dict[str, Any]) -> str:
    """Bars: how many times as fast as the baseline, median and range of the rounds."""
    factors = result["times as fast"]
    scale = (_WIDTH - 90) / max(max(values) for values in factors.values())
    width, height = result["size"]
    conditions = (
        f"{result['clips']} clips, {result['frames']} frames of {width}x{height}; {result['cpu']}, {result['cores']} "
        f"cores; load average {result['load_before'][0]:.1f} before; {len(factors[BASELINE])} rounds"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL + _WIDTH + 250}" height="{56 + _ROW * len(factors)}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="4" y="20" font-size="15">Clips per second, {BASELINE} = 1 (median and range of the rounds)</text>',
        f'<text x="4" y="38" fill="#666">{escape(conditions)}</text>',
    ]
    for row, (command, values) in enumerate(factors.items()):
        y, middle = 50 + row * _ROW, statistics.median(values)
        colour = "#76b900" if command == TARGET else "#4a6fa5" if command == BASELINE else "#a8a8a8"
        low, high = (_LABEL + value * scale for value in (min(values), max(values)))
        lines += [
            f'<text x="4" y="{y + 12}">{escape(command)}</text>',
            f'<rect x="{_LABEL}" y="{y}" width="{middle * scale:.1f}" height="{_ROW - 8}" fill="{colour}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 8}" y2="{y + 8}" stroke="black"/>',
            f'<text x="{high + 6:.1f}" y="{y + 12}">{middle:.2f}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
