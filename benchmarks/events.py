"""Event files, side by side: this code with and without numba, the code of an older commit, and other public readers.

    python benchmarks/events.py                      # writes benchmarks/results/events.json and events.svg
    python benchmarks/events.py --peers ENV/bin/python  # an environment with faery, expelliarmus, evlib, evutils

Each reader is a process of its own that reads the same file, in turn, round after round; times are of the
processor, and ratios are taken within rounds, so that a busy machine does not matter.
The older code is taken out of git.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
BASELINE = "d3671d3"
TENSORS = {
    "voxel_grid, normalised": ("voxel_grid", "signed", True),
    "voxel_grid": ("voxel_grid", "signed", False),
    "event_volume": ("event_volume", "signed", False),
    "histogram, split": ("histogram", "split", False),
}
WINDOW = 322_560  # events: 0.35 per pixel of 1280x720
OURS = ("numba", "numpy", "baseline")
PEERS = ("faery", "expelliarmus", "evlib", "evutils")


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="interpreter of an environment with other readers")
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="further recordings to read")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=40, help="size of a file")
    parser.add_argument("--quick", action="store_true", help="seconds; shows only that the script works")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/events.json")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        sys.stdout.write(json.dumps(WORKERS[arguments.worker[0]](*arguments.worker[1:])) + "\n")
        return
    if arguments.quick:
        arguments.rounds, arguments.megabytes = 1, 2
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), arguments)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    from event_report import plot, table

    plot(result, arguments.output.with_suffix(".svg"))
    sys.stdout.write(table(result) + "\n")


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    from event_recordings import write_dat, write_evt2, write_evt3

    baseline = _checkout(folder / "baseline")
    size = arguments.megabytes << 20
    files = [folder / "evt3.raw", folder / "evt2.raw", folder / "dat.dat"]
    for file, write in zip(files, (write_evt3, write_evt2, write_dat), strict=True):
        write(file, size)
    names = [*OURS, *(PEERS if arguments.peers else ())]
    reading: dict[str, Any] = {}
    for file in [*files, *arguments.files]:
        reading[file.name] = _rounds(
            arguments.rounds, names, lambda name, file=file: _read(name, file, baseline, arguments)
        )
    tensors = {
        kind: _rounds(arguments.rounds, OURS, lambda name, kind=kind: _run(name, baseline, "tensor", kind))
        for kind in TENSORS
    }
    memory = {}
    for factor in (1, 2):
        write_evt3(folder / "long.raw", factor * (1 if arguments.quick else 150) << 20)
        length = (folder / "long.raw").stat().st_size
        memory[f"{length >> 20} MiB"] = {
            name: _run(name, baseline, "memory", str(folder / "long.raw")) for name in OURS
        }
    return {
        "machine": f"{platform.machine()}, {_processor()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "baseline": BASELINE,
        "rounds": arguments.rounds,
        "window": WINDOW,
        "reading": reading,
        "tensors": tensors,
        "memory": memory,
    }


def _rounds(count: int, names: Any, run: Callable[[str], Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(count):
        for name in names:
            found[name].append(run(name))
    return found


def _read(name: str, file: Path, baseline: Path, arguments: argparse.Namespace) -> Any:
    if name in OURS:
        return _run(name, baseline, "read", str(file))
    return _run(name, baseline, "peer", name, str(file), interpreter=arguments.peers)


def _run(name: str, baseline: Path, *worker: str, interpreter: Path | None = None) -> Any:
    paths = [str(baseline if name == "baseline" else ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    if name == "numpy":
        environment["NUMBA_DISABLE_JIT"] = "1"
    command = [str(interpreter or sys.executable), __file__, "--worker", *worker]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def _checkout(folder: Path) -> Path:
    """The code of the older commit, with its packages below `stepcell`."""
    folder.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", BASELINE, "stepcell", "runtime"], check=True, capture_output=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    shutil.move(folder / "runtime", folder / "stepcell/runtime")
    return folder


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


# What the processes do.


def _modules() -> tuple[Any, Any, Any]:
    try:
        from stepcell.runtime.media import events
        from stepcell.runtime.media.events.formats import open_events
    except ImportError:
        from stepcell.runtime import events
        from stepcell.runtime.events.source import open_events
    return events.Events, events.event_tensor, open_events


def _best(action: Callable[[], Any], seconds: float = 1.5, least: int = 3) -> list[float]:
    """Processor seconds of the fastest of a few repetitions, after one to warm up."""
    action()
    times: list[float] = []
    started = time.monotonic()
    while len(times) < least or (time.monotonic() - started < seconds and len(times) < 50):
        before = time.process_time()
        action()
        times.append(time.process_time() - before)
    return [min(times), float(np.median(times))]


def _read_ours(path: str) -> dict[str, Any]:
    open_events = _modules()[2]
    digests, count = [hashlib.sha256() for _ in "xypt"], 0
    for part in open_events(Path(path)):
        count += len(part)
        for name, digest in zip("xypt", digests, strict=True):
            digest.update(getattr(part, name).tobytes())

    def read() -> None:
        for _ in open_events(Path(path)):
            pass

    seconds, median = _best(read, least=2)
    return {
        "events": count,
        "seconds": seconds,
        "median": median,
        "sha256": "".join(digest.hexdigest()[:16] for digest in digests),
    }


def _read_peer(name: str, path: str) -> dict[str, Any]:
    counts: list[int] = []

    def read() -> None:
        counts.append(sum(len(part) for part in _peer_parts(name, path)))

    seconds, median = _best(read, least=2)
    return {"events": counts[-1], "seconds": seconds, "median": median}


def _peer_parts(name: str, path: str) -> Iterator[Any]:
    kind = "dat" if path.endswith(".dat") else "evt3" if "evt3" in Path(path).name else "evt2"
    if name == "faery":
        import faery

        yield from faery.events_stream_from_file(path)
    elif name == "expelliarmus":
        import expelliarmus

        yield from expelliarmus.Wizard(encoding=kind, fpath=Path(path)).read_chunk()
    elif name == "evlib":
        import evlib

        yield evlib.load_events(path).collect()
    else:
        from evutils.io import EventReader

        yield from EventReader(path)


def _tensor(kind: str) -> dict[str, Any]:
    from event_recordings import SIZE

    Events, event_tensor, _ = _modules()
    from stepcell.event_spec import EventSpec, EventWindow

    representation, polarity, normalise = TENSORS[kind]
    rng = np.random.default_rng(0)
    width, height = SIZE
    x, y = rng.normal(640, 250, WINDOW).clip(0, width - 1), rng.normal(360, 140, WINDOW).clip(0, height - 1)
    t = np.sort(rng.integers(0, 30_000, WINDOW))
    events = Events.of(x.astype(int), y.astype(int), rng.integers(0, 2, WINDOW), t)
    spec = EventSpec(
        representation=representation,  # type: ignore[arg-type]
        bins=5,
        polarity=polarity,  # type: ignore[arg-type]
        window=EventWindow(size=1, unit="events"),
        normalise=normalise,
    )
    seconds, median = _best(lambda: event_tensor(events, spec, height, width))
    digest = hashlib.sha256(event_tensor(events, spec, height, width).tobytes()).hexdigest()
    return {"seconds": seconds, "median": median, "sha256": digest}


def _memory(path: str) -> dict[str, Any]:
    """Peak resident memory while the windows of a file become tensors; the first windows are counted as the start."""
    try:
        from stepcell.runtime.media.events import EventSource
    except ImportError:
        from stepcell.runtime.events import EventSource
    from stepcell.event_spec import EventSpec, EventWindow

    spec = EventSpec(representation="voxel_grid", bins=5, window=EventWindow(size=10_000, unit="us"), normalise=True)
    windows = 0
    started = time.process_time()
    for _ in EventSource(Path(path), spec):
        windows += 1
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"windows": windows, "seconds": seconds, "peak MiB": round(peak)}


WORKERS: dict[str, Callable[..., Any]] = {
    "read": _read_ours,
    "peer": _read_peer,
    "tensor": _tensor,
    "memory": _memory,
}

if __name__ == "__main__":
    main()
