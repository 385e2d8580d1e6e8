"""Benchmark of the fused kernels and of other implementations of the step, side by side on one GPU.

    python benchmarks/kernels.py                  # writes benchmarks/results/kernels-DEVICE.json and .svg
    python benchmarks/kernels.py --table benchmarks/results/kernels-DEVICE.json

Every contender gets the same float16 x and states, is checked against float64, captured into a CUDA graph and timed
twice: isolated replays of one step, and a chain of steps that depend on each other. Floors are computed from copy
bandwidth and matrix rate, measured in the same run. Each of our kernels is also timed separately with every tile.
Without a GPU the script says so and runs nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_cases import CASES, Problem, in_turn, make_problem
from kernel_engines import onnx_runtime, tensorrt
from kernel_ours import Device, Launch, defaults, fastest, ours, overlapping, tile_times
from kernel_peers import convolutions_alone, peers_of
from kernel_plot import svg
from kernel_report import report
from kernel_timing import Runs, ceilings, runs_of, times_of

from stepcell.cli.console import log
from stepcell.files import read_bytes, write_atomic
from stepcell.plugins.kernels.store import default_folder

TOLERANCE = 5e-3  # of one step in float16, relative to max(1, |value|)
PACKAGES = ("torch", "triton", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx")
STATES: tuple[Any, ...] = ("float16", "float32")

# name -> (role, builder); roles: "ours", "hosted" (our kernels in TensorRT), "peer", "bound" (not the whole step)
Contenders = Mapping[str, tuple[str, Callable[[], Runs]]]


def torch_contenders(problem: Problem) -> Contenders:
    """The step in torch, and its convolutions alone."""
    found: dict[str, tuple[str, Callable[[], Runs]]] = {}
    builders = {**peers_of(problem.case.cells[0]), "cuDNN convolutions alone": convolutions_alone}
    for name, build in builders.items():

        def runs(build: Any = build, *, eager: bool = name.startswith("torch,")) -> Runs:
            steps = [build(cell, own) for cell, own in zip(problem.case.cells, problem.weights, strict=True)]
            return runs_of(in_turn(steps), problem.xs, problem.states, eager=eager)

        found[name] = ("bound" if build is convolutions_alone else "peer", runs)
    return found


def runtime_contenders(problem: Problem, kernels: Path) -> Contenders:
    """The exported file in ONNX Runtime and in TensorRT, with and without our plugin."""
    found: dict[str, tuple[str, Callable[[], Runs]]] = {
        "ONNX Runtime CUDA": ("peer", partial(onnx_runtime, problem)),
        "ONNX Runtime CUDA, NHWC": ("peer", partial(onnx_runtime, problem, nhwc=True)),
    }
    for state in STATES:
        engine = partial(tensorrt, problem, state, kernels)
        found[f"TensorRT-RTX, {state} state"] = ("peer", partial(engine, flavor="tensorrt-rtx"))
        found[f"TensorRT, {state} state"] = ("peer", engine)
        found[f"stepcell in TensorRT, {state} state"] = ("hosted", partial(engine, plugin="on"))
    return found


def our_contenders(problem: Problem, capability: str, launch: Launch, rows: list[dict[str, Any]]) -> Contenders:
    """Our kernels with the table's tiles and with tiles that were faster in `rows`; both also with overlapping launches
    if the GPU supports them.
    """
    found: dict[str, tuple[str, Callable[[], Runs]]] = {}

    def runs(state: Any, chosen: Any) -> Runs:
        notes = [f"{kernel}: {tile.label}" for tiles in chosen for kernel, tile in tiles.items()]
        step, states = ours(problem, state, chosen, launch)
        return runs_of(step, problem.xs, states, notes=tuple(notes))

    for state in STATES:
        chosen = defaults(problem, state, capability)
        cells = [cell.with_state(state) for cell in problem.case.cells]
        best = fastest(rows, chosen, cells)
        ways = {"": chosen} | ({", fastest tiles": best} if best != chosen else {})
        for way, tiles in ways.items():
            name = f"stepcell, {state} state{way}"
            found[name] = ("ours", partial(runs, state, tiles))
            early = overlapping(problem, state, capability, tiles)
            if early != tiles:
                found[f"{name}, overlapping launches"] = ("ours", partial(runs, state, early))
    return found


def run_contenders(
    problem: Problem, contenders: Contenders, clock: Callable[[Runs], dict[str, dict[str, float]]] = times_of
) -> dict[str, Any]:
    """Check and time every contender; those that cannot run are listed with the reason."""
    results: dict[str, Any] = {}
    for name, (role, build) in contenders.items():
        try:
            results[name] = {"role": role, **_checked(problem, role, build(), clock)}
        except Exception as error:  # a peer may fail in any way; go on with the others
            lines = str(error).strip().splitlines() or [type(error).__name__]
            results[name] = {"role": role, "not_run": lines[0]}
        found = results[name]
        times = [f"{way} {each['median']:.1f}" for way, each in found.get("microseconds", {}).items()]
        log(f"{problem.case.name:<16} {name:<40} {', '.join(times) or 'not run: ' + found['not_run']}")
    return results


def _checked(problem: Problem, role: str, runs: Runs, clock: Any) -> dict[str, Any]:
    error = None
    new = runs.check()
    if role != "bound":
        pairs = zip(new, problem.exact, strict=False)  # the op's states come first, then those of the contender
        error = max(float(((a.double() - b).abs() / b.abs().clamp(min=1)).max()) for a, b in pairs)
        if not error <= TOLERANCE:
            return {"not_run": f"wrong: differs from float64 by {error:.1e}"}
    return {"microseconds": clock(runs), "error": error, "notes": list(runs.notes)}


def case_result(problem: Problem, limits: Mapping[str, float], results: Any, rows: list[dict[str, Any]]) -> Any:
    """A case for the JSON file."""
    case = problem.case
    return {
        "name": case.name,
        "batch": case.batch,
        "height": case.height,
        "width": case.width,
        "cells": [cell.label for cell in case.cells],
        "floor_microseconds": case.floor(**limits),
        "contenders": results,
        "tiles": rows,
    }


def measure(arguments: argparse.Namespace) -> int:
    """Run every case and write the result after each; prints the report."""
    torch.backends.cudnn.benchmark = True
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    device, limits = Device(capability, arguments.kernels), ceilings()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "capability": capability,
        "machine": platform.platform(),
        "versions": versions(),
        "ceilings": limits,
        "cases": [],
    }
    word = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    output = arguments.output or Path(f"benchmarks/results/kernels-{word}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    for case in (case for case in CASES if arguments.cases in case.name):
        problem, rows = make_problem(case, "cuda"), []
        for state in STATES:
            try:
                rows += tile_times(problem, state, capability, device.launch, tune=arguments.tune)
            except Exception as error:  # reported by the contenders too
                log(f"{case.name:<16} tiles, {state} state: not run: {error}")
        all_of_them = {
            **our_contenders(problem, capability, device.launch, rows),
            **torch_contenders(problem),
            **runtime_contenders(problem, arguments.kernels),
        }
        result["cases"].append(case_result(problem, limits, run_contenders(problem, all_of_them), rows))
        write_atomic(output, json.dumps(result, indent=1) + "\n")
    write_atomic(output.with_suffix(".svg"), svg(result))
    sys.stdout.write(report(result))
    return 0


def versions() -> dict[str, str]:
    """Versions of the installed packages."""
    found = {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Measure, or show an existing result; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time the fused kernels against their peers on a GPU.")
    parser.add_argument("--output", type=Path, help="JSON; .svg beside it; named after the device by default")
    parser.add_argument("--kernels", type=Path, default=default_folder(), help="folder of compiled kernels")
    parser.add_argument("--cases", default="", help="only those whose name contains this")
    parser.add_argument("--tune", action="store_true", help="time more tiles than the table has; needs Triton")
    parser.add_argument("--table", type=Path, metavar="RESULT", help="print a result as Markdown, measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        sys.stdout.write(report(json.loads(read_bytes(arguments.table))))
        return 0
    if torch.cuda.is_available():
        return measure(arguments)
    log("not run: no CUDA device")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.output, json.dumps({"not_run": "no CUDA device"}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
