"""`stepcell map` over 40 small clips against one process over the same folder, the zoo's denoiser on a CPU.

    python benchmarks/map.py
    python benchmarks/map.py --ray build/fleet-ray/bin/python
    python benchmarks/map.py --quick

Whole commands are timed, with their start, in interleaved rounds; ratios are taken within rounds. All must write the
same bytes. Writes benchmarks/results/map.json and map.svg, and needs the extras `demo` and `ort`.

`--ray` takes the Python of an environment with ray, such as that of `make fleet-ray`, and times two workers over 200
clips there: actors of a cluster that the command starts and ends, against local processes. Writes map_ray.json and
map_ray.svg.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
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

from stepcell import StepLoop, __version__, run_streams
from stepcell.models.zoo.clips import HELD_OUT, read_clip
from stepcell.runtime.media.video_writer import VideoSink

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "models/zoo/denoiser.safetensors"
TWO_WORKERS = "map, 2 workers"
WITH_SLOTS = "with-slots"  # `run_with_slots` in a process of its own
COMMANDS = {
    "run, one process": ["run", "--backend", "onnxruntime"],
    "run, one process, one thread": ["run", "--backend", "onnxruntime", "--threads", "1"],
    "run_streams, one process, 4 slots": [WITH_SLOTS],
    "map, 1 worker": ["map", "--workers", "1"],
    TWO_WORKERS: ["map", "--workers", "2"],
}
ON_RAY = {
    TWO_WORKERS: ["map", "--workers", "2"],
    "map, 2 workers on Ray": ["map", "--workers", "2", "--engine", "ray"],
}
SLOTS = 4
_LABEL, _WIDTH, _ROW = 230, 420, 24


def main() -> None:
    """Time the commands, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, help="40, with --ray 200")
    parser.add_argument("--frames", type=int, default=24, help="of each clip")
    parser.add_argument("--rounds", type=int, help="4, with --ray 3")
    parser.add_argument("--ray", type=Path, metavar="PYTHON", help="a Python with ray: times Ray's workers")
    parser.add_argument("--quick", action="store_true", help="shows that it works, not how fast anything is")
    parser.add_argument("--output", type=Path, help="benchmarks/results/map.json, with --ray map_ray.json")
    if sys.argv[1:2] == [WITH_SLOTS]:
        run_with_slots(*map(Path, sys.argv[2:]))
        return
    arguments = parser.parse_args()
    commands = COMMANDS if arguments.ray is None else ON_RAY
    clips, rounds = (40, 4) if arguments.ray is None else (200, 3)
    clips, rounds = arguments.clips or clips, arguments.rounds or rounds
    if arguments.quick:
        clips, arguments.frames, rounds = 2, 2, 1
    python = Path(sys.executable) if arguments.ray is None else arguments.ray.absolute()
    output = arguments.output or ROOT / f"benchmarks/results/map{'' if arguments.ray is None else '_ray'}.json"
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "denoiser.onnx"
        call(sys.executable, "-m", "stepcell", "export", CHECKPOINT, "-o", model)
        size = write_clips(folder / "clips", clips, arguments.frames)
        seconds: dict[str, list[float]] = {command: [] for command in commands}
        cpu_seconds: dict[str, list[float]] = {command: [] for command in commands}
        digests = set()
        for number in range(rounds):
            order = list(commands.items())
            for command, words in order[number % len(order) :] + order[: number % len(order)]:
                started, used = time.perf_counter(), children_seconds()
                if words == [WITH_SLOTS]:
                    call(python, __file__, WITH_SLOTS, model, folder / "clips", folder / "out")
                else:
                    paths = [model, "-i", folder / "clips", "-o", folder / "out"]
                    call(python, "-m", "stepcell", words[0], *paths, *words[1:])
                seconds[command].append(round(time.perf_counter() - started, 3))
                cpu_seconds[command].append(round(children_seconds() - used, 3))
                digests.add(digest(folder / "out"))
                shutil.rmtree(folder / "out")
    if len(digests) != 1:
        sys.exit(f"the outputs differ: {len(digests)} digests")
    baseline = next(iter(commands))
    result = {
        "stepcell": __version__,
        **versions(python, ["onnxruntime", "av"] if arguments.ray is None else ["onnxruntime", "av", "ray"]),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load,
        "load_after": os.getloadavg(),
        "clips": clips,
        "frames": clips * arguments.frames,
        "size": size,
        "digest": digests.pop(),
        "seconds": seconds,
        **({"cpu seconds": cpu_seconds} if arguments.ray is None else {}),  # those of Ray are of no child
        "times as fast": {
            command: [round(one / other, 3) for one, other in zip(seconds[baseline], times, strict=True)]
            for command, times in seconds.items()
        },
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".svg").write_text(svg(result))
    for command, factors in result["times as fast"].items():
        spread = f"{min(factors):.2f} to {max(factors):.2f}"
        sys.stdout.write(f"{command}: {statistics.median(factors):.2f} ({spread}) times as fast as {baseline}\n")


def run_with_slots(model: Path, clips: Path, out: Path) -> None:
    """Run a folder in this process, a few clips at a time in one batch."""
    out.mkdir()
    paths = sorted(clips.iterdir())
    with StepLoop.open(model, slots=SLOTS, backend="onnxruntime") as loop:
        for start in range(0, len(paths), SLOTS):
            some = paths[start : start + SLOTS]
            run_streams(loop, list(map(str, some)), [str(out / path.name) for path in some])


def call(*command: object) -> None:
    """Run a command, which must succeed."""
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}: {done.stderr[-2000:]}")


def children_seconds() -> float:
    """CPU time of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def versions(python: Path, packages: list[str]) -> dict[str, str]:
    """Versions of packages in an environment, and of its Python."""
    script = "import importlib.metadata as m, json, platform, sys; d = m.packages_distributions(); print(json.dumps("
    script += "{'python': platform.python_version()} | {p: m.version(d[p][0]) for p in sys.argv[1:]}))"
    said = subprocess.run([str(python), "-c", script, *packages], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(said.stdout)
    return found


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
    baseline = next(iter(factors))
    scale = (_WIDTH - 90) / max(max(values) for values in factors.values())
    width, height = result["size"]
    conditions = (
        f"{result['clips']} clips, {result['frames']} frames of {width}x{height}; {result['cpu']}, {result['cores']} "
        f"cores; load average {result['load_before'][0]:.1f} before; {len(factors[baseline])} rounds"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL + _WIDTH + 250}" height="{56 + _ROW * len(factors)}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="4" y="20" font-size="15">Clips per second, {baseline} = 1 (median and range of the rounds)</text>',
        f'<text x="4" y="38" fill="#666">{escape(conditions)}</text>',
    ]
    last = list(factors)[-1]
    for row, (command, values) in enumerate(factors.items()):
        y, middle = 50 + row * _ROW, statistics.median(values)
        colour = "#4a6fa5" if command == baseline else "#76b900" if command == last else "#a8a8a8"
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
