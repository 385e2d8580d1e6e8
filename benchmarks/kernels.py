"""Time the fused ConvGRU kernels and what else could compute the step, side by side on one GPU.

    python benchmarks/kernels.py --output benchmarks/results/kernels.json

Every contender takes the same half x and state in channels-last memory (the kernels also a float32
state), is checked against float64, captured into a CUDA graph and timed twice: isolated replays of
one step, and a chain of steps of which each needs the one before. Floors come from the copy bandwidth
and the matrix rate measured in the same run. Without a GPU the file says that nothing was run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_peers import PEERS, Weights
from kernel_plot import svg
from torch import Tensor

from stepcell.console import log
from stepcell.errors import StepcellError
from stepcell.files import write_atomic
from stepcell.models.cells import conv_gru
from stepcell.plugins.kernels.cell import Cell
from stepcell.plugins.kernels.packing import pack
from stepcell.plugins.kernels.signature import PARAMETERS, kernels_of
from stepcell.plugins.kernels.store import default_folder, images_for, wanted

CHAIN = 16
REPLAYS = 300
TOLERANCE = 5e-3  # of one step in half, relative to max(1, |value|)


@dataclass(frozen=True)
class Shape:
    """One step: batch, channels of x and of the state, map and kernel."""

    name: str
    batch: int
    inputs: int
    hidden: int
    height: int
    width: int
    kernel: tuple[int, int] = (3, 3)

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    @property
    def flops(self) -> int:
        taps = self.kernel[0] * self.kernel[1]
        return 2 * self.pixels * taps * (self.inputs + self.hidden) * 3 * self.hidden

    @property
    def nbytes(self) -> int:
        """Of x, the state in and out, and the weights, each moved once, in half."""
        taps = self.kernel[0] * self.kernel[1]
        weights = taps * (self.inputs + self.hidden) * 3 * self.hidden
        return 2 * (self.pixels * (self.inputs + 2 * self.hidden) + weights)

    def cell(self, state: Any) -> Cell:
        return Cell("ConvGRU", self.inputs, self.hidden, self.kernel, "before", "soft", state)


SHAPES = [
    Shape("S1 small", 1, 32, 64, 64, 64),
    Shape("S2 medium", 1, 64, 64, 128, 128),
    Shape("S3 RAFT 1x5", 1, 128, 128, 55, 128, (1, 5)),
    Shape("S4 four streams", 4, 64, 64, 128, 128),
    Shape("S5 matting", 1, 16, 16, 540, 960),
    Shape("S6 events", 1, 256, 256, 20, 15),
]

Step = Callable[[Tensor, Tensor], Tensor]


def random_weights(shape: Shape, device: str, dtype: torch.dtype) -> Weights:
    """Weights that keep every gate awake."""
    generator = torch.Generator().manual_seed(0)
    scale = ((shape.inputs + shape.hidden) * shape.kernel[0] * shape.kernel[1]) ** -0.5
    C = shape.hidden
    sizes = [(3 * C, shape.inputs), (2 * C, C), (C, C)]
    w_x, w_h, w_n = (torch.randn((*s, *shape.kernel), generator=generator) * scale for s in sizes)
    b = torch.randn(3 * C, generator=generator) * 0.1
    return Weights(*(t.half().to(device, dtype) for t in (w_x, b, w_h, w_n)))


def reference(weights: Weights, x: Tensor, h: Tensor) -> Tensor:
    """The step in float64."""
    return conv_gru(*(t.double() for t in (x, h, weights.x, weights.b, weights.h, weights.n)))


def tile_choices(shape: Shape, state: str, capability: str) -> list[dict[str, str]]:
    """Tile of each kernel: the defaults, then every other tile of every kernel in turn."""
    cell = shape.cell(state)
    used = kernels_of(cell, half_copy=True)
    offered = [(kernel, tile.label) for kernel, tile in wanted(cell, capability, shape.pixels) if kernel in used]
    default = dict(reversed(offered))
    return [default, *({**default, kernel: tile} for kernel, tile in offered if tile != default[kernel])]


def kernels_step(
    shape: Shape, weights: Weights, state: str, folder: Path, capability: str, tiles: dict[str, str]
) -> tuple[Step, list[str]]:
    """The step by our kernels. A float32 state is kept beside h, as a loop keeps it.

    `h` in channels-last memory is a half map as the kernels read it (channels are multiples of 8 here).
    """
    from stepcell.plugins.launch import Launcher

    cell = shape.cell(state)
    images = list(images_for(cell, capability, folder, shape.pixels))
    chosen = {i.info.kernel: i for i in images if tiles.get(i.info.kernel) == i.info.tile}
    launchers = [(kernel, Launcher(chosen[kernel])) for kernel in kernels_of(cell, half_copy=True)]
    arrays = {"W_x": weights.x, "b": weights.b, "W_h": weights.h, "W_n": weights.n}
    packed = {
        k: torch.from_numpy(v).cuda() for k, v in pack(cell, {k: v.cpu().numpy() for k, v in arrays.items()}).items()
    }
    wide: dict[int, Tensor] = {}  # the float32 state that belongs to a half copy

    def step(x: Tensor, h: Tensor) -> Tensor:
        y, z, rh = (torch.empty_like(h) for _ in range(3))
        state_in = wide.setdefault(h.data_ptr(), h.float().contiguous()) if state == "float32" else h
        state_out = wide.setdefault(y.data_ptr(), torch.empty_like(state_in)) if state == "float32" else y
        buffers = {**packed, "x": x, "h": h, "state": state_in, "z": z, "rh": rh, "y": y, "state_out": state_out}
        stream = torch.cuda.current_stream().cuda_stream
        for kernel, launcher in launchers:
            names = [p.buffer for p in PARAMETERS[kernel] if p.dtype != "int32"]
            addresses = [buffers[n].data_ptr() if n in buffers else 0 for n in names]
            launcher.launch(stream, addresses, shape.batch, shape.height, shape.width)
        return y

    return step, [f"{kernel}: {tile}" for kernel, tile in tiles.items()]


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of what `run` launches, after warming up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def microseconds(run: Callable[[], Any], count: int = REPLAYS, *, queued: bool = True) -> dict[str, float]:
    """Median and spread of isolated runs on the device.

    `queued`: the device waits until the whole run has been submitted, so that the host's share is not
    in the time; without it the host's share is what a caller without a graph sees.
    """
    times = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if queued:
            torch.cuda._sleep(400_000)  # clock ticks: some 200 microseconds
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    deciles = statistics.quantiles(times, n=10)
    return {"median": statistics.median(times), "p10": deciles[0], "p90": deciles[8]}


def measured(step: Step, xs: list[Tensor], h: Tensor, *, eager: bool) -> dict[str, dict[str, float]]:
    """Microseconds per step: one graph replay, a chain in one graph, and without a graph if `eager`."""

    def chain() -> Tensor:
        state = h
        for i in range(CHAIN):
            state = step(xs[i % len(xs)], state)
        return state

    results = {"isolated": microseconds(captured(lambda: step(xs[0], h)).replay)}
    whole = microseconds(captured(chain).replay, REPLAYS // 3)
    results["chain"] = {name: value / CHAIN for name, value in whole.items()}
    if eager:
        results["eager"] = microseconds(lambda: step(xs[0], h), queued=False)
    return results


def ceilings() -> dict[str, float]:
    """What this device does at most: bytes per second of a copy, half FLOP per second of a matrix product."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    copy = microseconds(lambda: target.copy_(source), 30)["median"]
    product = microseconds(lambda: a @ b, 30)["median"]
    return {"bytes_per_second": 2 * 2**30 / copy * 1e6, "flop_per_second": 2 * 8192**3 / product * 1e6}


def contenders(
    shape: Shape, weights: Weights, folder: Path, capability: str
) -> dict[str, tuple[Callable[[], tuple[Step, list[str]]], bool]]:
    """Name -> (builder of a step and notes, whether it computes the step)."""
    ours = {}
    for state in ("float16", "float32"):
        for number, tiles in enumerate(tile_choices(shape, state, capability)):
            name = f"stepcell, {state} state" + (f", other tiles {number}" if number else "")
            ours[name] = (partial(kernels_step, shape, weights, state, folder, capability, tiles), True)
    return ours | {name: (lambda b=build: (b(weights), []), whole) for name, (build, whole) in PEERS.items()}


def run_shape(shape: Shape, folder: Path, capability: str) -> dict[str, Any]:
    """Every contender on one shape; what cannot run is listed with the reason."""
    weights = random_weights(shape, "cuda", torch.float16)
    size = (shape.batch, shape.inputs, shape.height, shape.width)
    layout: dict[str, Any] = {"memory_format": torch.channels_last}
    xs = [torch.randn(size, device="cuda").half().contiguous(**layout) for _ in range(4)]
    h = torch.randn((shape.batch, shape.hidden, *size[2:]), device="cuda").clamp(-1, 1).half().contiguous(**layout)
    exact = reference(weights, xs[0], h)
    results: dict[str, Any] = {}
    for name, (build, whole) in contenders(shape, weights, folder, capability).items():
        try:
            step, notes = build()
            error = float(((step(xs[0], h).double() - exact).abs() / exact.abs().clamp(min=1)).max())
        except (StepcellError, RuntimeError, ImportError) as problem:
            results[name] = {"not_run": str(problem).splitlines()[0]}
            log(f"{shape.name:<16} {name:<36} not run: {results[name]['not_run']}")
            continue
        if whole and not error <= TOLERANCE:
            results[name] = {"not_run": f"wrong: differs from float64 by {error:.1e}"}
            log(f"{shape.name:<16} {name:<36} {results[name]['not_run']}")
            continue
        times = measured(step, xs, h, eager=name.startswith("torch,"))
        results[name] = {"microseconds": times, "error": error if whole else None, "notes": notes, "step": whole}
        log(f"{shape.name:<16} {name:<36} {times['isolated']['median']:8.1f} us, chain {times['chain']['median']:8.1f}")
    return results


def main() -> int:
    """Run everything and write the result; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time the fused kernels against their peers on a GPU.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels.json"))
    parser.add_argument("--kernels", type=Path, default=default_folder(), help="folder of compiled kernels")
    parser.add_argument("--shapes", default="", help="only those whose name contains this")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": platform.platform(), "torch": torch.__version__}
    if not torch.cuda.is_available():
        result["not_run"] = "no CUDA device"
        log("not run: no CUDA device")
    else:
        torch.backends.cudnn.benchmark = True
        major, minor = torch.cuda.get_device_capability()
        result |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "ceilings": ceilings()}
        result["cudnn"] = torch.backends.cudnn.version()
        result["shapes"] = []
        for shape in SHAPES:
            if arguments.shapes in shape.name:
                floors = {
                    "compute": shape.flops / result["ceilings"]["flop_per_second"] * 1e6,
                    "memory": shape.nbytes / result["ceilings"]["bytes_per_second"] * 1e6,
                }
                results = run_shape(shape, arguments.kernels, f"{major}.{minor}")
                result["shapes"].append({**asdict(shape), "floor_microseconds": floors, "contenders": results})
                write_atomic(arguments.output, json.dumps(result, indent=1) + "\n")
    write_atomic(arguments.output, json.dumps(result, indent=1) + "\n")
    if "not_run" not in result:
        write_atomic(arguments.output.with_suffix(".svg"), svg(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
