"""A week in an hour: ten million steps of a small model, with everything that happens to a loop in the field.

Four slots of one `StepLoop` are shared by streams that come and go on a simulated clock; each has a frame rate of its
own, so most steps have idle rows. Streams are reset and sent NaN; the states are saved; the process goes back to an
older snapshot, or closes the model and opens it again. Beside every stream runs the loop a user would write: plain ONNX
Runtime with a batch of one and the state in a variable. Outputs are compared in every step, states now and then;
resident memory and open files are sampled throughout.

    python benchmarks/week.py --output benchmarks/results/week.json --plot docs/images/week.png
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.errors import InputError
from stepcell.runtime.loop.slots import Slot

WEEK = 7 * 24 * 3600.0  # seconds of the simulated clock
SLOTS = 4
SHAPE = (1, 2, 3, 4)  # of x and h
RATES = (1.0, 0.8, 0.6, 0.5)  # of the cameras, in the order of their attaching; 1 is a frame in every step
LIMIT = 1e-6  # difference of outputs and states, which lie within -1..1, in float32
EVENTS = {"detach": 2_000, "reset": 500, "nan": 300, "save": 2_000, "go_back": 20_000, "reopen": 50_000}
"""Steps between two events of a kind, on average."""
STATES_EVERY = 100  # steps between two comparisons of the states
SAMPLES = 500  # of memory and open files, over the whole run

Array = NDArray[np.float32]


@dataclass
class Camera:
    """A stream: its slot, the state of its plain loop, and when its next frame is due, in seconds."""

    slot: Slot
    state: Array
    period: float
    due: float


class Week:
    """The run and what it has seen.

    Args:
        model: a float32 ONNX file of one ConvGRU.
        folder: for the snapshot.
        steps: number of steps, in each of which at least one stream has a frame.
        seed: of everything that is drawn.

    Attributes:
        counts: how often each event took place.
        worst: largest differences between the loop and the plain loops.
        samples: memory and open files over time.
    """

    def __init__(self, model: Path, folder: Path, steps: int, seed: int) -> None:
        self._model, self._snapshot, self._steps = model, folder / "state.safetensors", steps
        self._random = np.random.default_rng(seed)
        self._frames = self._random.uniform(-1, 1, (256, *SHAPE)).astype(np.float32)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._checks_finite = True
        self._loop = self._open()
        self._cameras: dict[str, Camera] = {}
        self._saved: list[Camera] = []
        self._now, self._tick = 0.0, WEEK / steps
        self.counts = dict.fromkeys(("attach", *EVENTS, "frames", "idle_rows"), 0)
        self.worst = {"output": 0.0, "state": 0.0}
        self.samples: list[dict[str, float]] = []

    def run(self) -> None:
        """All steps. Raises AssertionError where the loop differs from the plain loops."""
        started = time.monotonic()
        block = -(-self._steps // SAMPLES)
        for first in range(0, self._steps, block):
            steps = min(block, self._steps - first)
            events: dict[int, list[str]] = {}
            for name, every in EVENTS.items():
                for when in np.flatnonzero(self._random.random(steps) < 1 / every):
                    events.setdefault(int(when), []).append(name)
            frames = self._random.integers(0, len(self._frames), (steps, SLOTS)).tolist()
            for step in range(steps):
                while len(self._cameras) < SLOTS:
                    self._attach()
                for name in events.get(step, ()):
                    getattr(self, f"_{name}")()
                    self.counts[name] += 1
                self._step(frames[step], compare_states=step % STATES_EVERY == 0)
            self._sample(first + steps, time.monotonic() - started)
        self._loop.close()

    def _open(self) -> StepLoop:
        return StepLoop.open(self._model, slots=SLOTS, threads=1, check_finite=self._checks_finite)

    def _attach(self) -> None:
        number = self.counts["attach"]
        slot = self._loop.attach(f"camera {number}")
        period = self._tick / RATES[number % len(RATES)]
        self._cameras[slot.name] = Camera(slot, np.zeros(SHAPE, np.float32), period, self._now)
        self.counts["attach"] += 1

    def _one(self) -> Camera:
        return list(self._cameras.values())[self._random.integers(len(self._cameras))]

    def _detach(self) -> None:
        self._loop.detach(self._cameras.pop(self._one().slot.name).slot)
        if not self._cameras:
            self._attach()

    def _reset(self) -> None:
        camera = self._one()
        self._loop.reset([camera.slot])
        camera.state = np.zeros(SHAPE, np.float32)

    def _nan(self) -> None:
        """A frame of NaN beside good ones: refused, nothing stepped; or, unchecked, in the states until a reset."""
        sick, others = self._one(), []
        frames: dict[Slot, dict[str, Array]] = {sick.slot: {"x": np.full(SHAPE, np.nan, np.float32)}}
        for camera in self._cameras.values():
            if camera is not sick:
                frames[camera.slot] = {"x": self._frames[0]}
                others.append(camera)
        if self._checks_finite:
            try:
                self._loop.step_slots(frames)
            except InputError:
                return
            raise AssertionError("a frame of NaN was taken")
        outputs = self._loop.step_slots(frames)
        assert np.isnan(outputs[sick.slot]["y"]).any(), "NaN in, none out"
        for camera in others:
            self._compare(camera, self._frames[0], outputs[camera.slot]["y"])
        self._loop.reset([sick.slot])
        sick.state = np.zeros(SHAPE, np.float32)

    def _save(self) -> None:
        self._loop.save(self._snapshot)
        self._saved = [replace(camera) for camera in self._cameras.values()]

    def _go_back(self) -> None:
        if self._saved:
            self._restore()

    def _reopen(self) -> None:
        self._save()
        self._loop.close()
        self._checks_finite = not self._checks_finite
        self._loop = self._open()
        self._restore()

    def _restore(self) -> None:
        self._loop.restore(self._snapshot)
        slots = self._loop.slots
        assert sorted(slots) == sorted(camera.slot.name for camera in self._saved), "other slots than were saved"
        self._cameras = {}
        for camera in self._saved:
            slot = slots[camera.slot.name]
            assert slot.index == camera.slot.index, "another row than was saved"
            self._cameras[slot.name] = replace(camera, slot=slot, due=self._now)

    def _step(self, numbers: Sequence[int], *, compare_states: bool) -> None:
        cameras = list(self._cameras.values())
        self._now = max(self._now + self._tick, min(camera.due for camera in cameras))
        due = [camera for camera in cameras if camera.due <= self._now]
        frames = {camera.slot: {"x": self._frames[numbers[camera.slot.index]]} for camera in due}
        before = self._loop.state()["h"] if compare_states and self.samples else None
        outputs = self._loop.step_slots(frames)
        for camera in due:
            camera.due = max(camera.due + camera.period, self._now)
            self._compare(camera, frames[camera.slot]["x"], outputs[camera.slot]["y"])
        self.counts["frames"] += len(due)
        self.counts["idle_rows"] += len(cameras) - len(due)
        if compare_states:
            self._compare_states(cameras, before, due)

    def _compare(self, camera: Camera, x: Array, y: Array) -> None:
        """Step the plain loop of a camera and compare its output."""
        expected, camera.state = self._session.run(["y", "state_out.h"], {"x": x, "state_in.h": camera.state})
        self._require("output", float(np.abs(expected - y).max()))

    def _compare_states(self, cameras: Sequence[Camera], before: Array | None, stepped: Sequence[Camera]) -> None:
        after = self._loop.state()["h"]
        for camera in cameras:
            row = camera.slot.index
            self._require("state", float(np.abs(camera.state[0] - after[row]).max()))
            if before is not None and camera not in stepped:
                assert before[row].tobytes() == after[row].tobytes(), "a row without a frame has changed"

    def _require(self, what: str, difference: float) -> None:
        if not difference <= self.worst[what]:  # NaN too
            self.worst[what] = difference
            assert difference <= LIMIT, f"{what} differs by {difference}"

    def _sample(self, steps: int, seconds: float) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        sample = {
            "steps": steps,
            "days": round(self._now / 86400, 4),
            "seconds": round(seconds, 1),
            "resident_mib": round(resident / 2**20, 3),
            "open_files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        }
        self.samples.append(sample)
        if len(self.samples) % 10 == 0:
            print(json.dumps(sample), file=sys.stderr, flush=True)  # noqa: T201


def export(path: Path) -> None:
    """Write the model; in a process of its own, so that torch is no part of the memory that is measured."""
    import torch

    from stepcell.exporter import export_onnx
    from stepcell.models import CellStack, ConvGRUCell

    torch.manual_seed(0)
    export_onnx(CellStack([ConvGRUCell(2, 2)]), path, precision="float32")


def result(week: Week, steps: int, seed: int) -> dict[str, Any]:
    """What is written as JSON."""
    warm = week.samples[len(week.samples) // 10 :]
    resident = [sample["resident_mib"] for sample in warm]
    return {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
        },
        "steps": steps,
        "seed": seed,
        "simulated_days": week.samples[-1]["days"],
        "seconds": week.samples[-1]["seconds"],
        "counts": week.counts,
        "worst_difference": week.worst,
        "resident_mib": {"after_a_tenth": resident[0], "at_the_end": resident[-1], "largest": max(resident)},
        "open_files": sorted({sample["open_files"] for sample in warm}),
        "samples": week.samples,
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot memory and steps over the simulated days."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    days = [sample["days"] for sample in found["samples"]]
    figure, axes = plt.subplots(figsize=(7, 3), dpi=110)
    axes.plot(days, [sample["resident_mib"] for sample in found["samples"]], color="tab:blue")
    axes.set(xlabel="simulated days", ylabel="resident memory, MiB", ylim=(0, found["resident_mib"]["largest"] * 1.2))
    right = axes.twinx()
    right.plot(days, [sample["open_files"] for sample in found["samples"]], color="tab:grey", linestyle="--")
    right.set(ylabel="open files (dashed)", ylim=(0, max(found["open_files"]) * 2))
    worst = max(found["worst_difference"].values())
    axes.set_title(f"{found['steps']:,} steps of {SLOTS} slots, {worst:.1e} from plain loops", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--plot", type=Path, help="PNG")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = Path(name, "model.onnx")
        child = multiprocessing.get_context("spawn").Process(target=export, args=(model,))
        child.start()
        child.join()
        week = Week(model, Path(name), options.steps, options.seed)
        week.run()
    found = result(week, options.steps, options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        plot(found, options.plot)
    print(json.dumps({key: value for key, value in found.items() if key != "samples"}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
