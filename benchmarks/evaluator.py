"""GraphEvaluator against onnx.reference, step by step on the zoo's denoiser in float16.

Both take the same states and frames in turns, and the CPU time of the process is taken, so that what else the machine
does falls on both. The ratio is that of the two in one turn. Beside it the evaluator alone at a larger size, in
each arithmetic and with the derivative: the seconds that a check over 1000 steps takes.

    OPENBLAS_NUM_THREADS=1 python benchmarks/evaluator.py --output benchmarks/results/evaluator.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from stepcell import export_onnx, load_checkpoint, step_model
from stepcell.models.zoo import denoiser
from stepcell.runtime.evaluate import GraphEvaluator
from stepcell.runtime.evaluate.arithmetic import Arithmetic

SIZE, LARGE = (72, 88), (144, 176)
Array = NDArray[Any]


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of one call, and its result."""
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def quartiles(values: list[float], digits: int) -> list[float]:
    """25%, median and 75%."""
    return [round(float(value), digits) for value in np.percentile(values, (25, 50, 75))]


def against_reference(path: Path, size: tuple[int, int], steps: int) -> dict[str, Any]:
    """Both over the same frames, each with the states of the evaluator."""
    evaluator, reference = GraphEvaluator(path), ReferenceEvaluator(onnx.load(path))
    rng = np.random.default_rng(0)
    states = evaluator.initial_states({"x": (1, 3, *size)})
    ours, theirs, worst = [], [], 0.0
    for step in range(steps + 1):
        x = rng.random((1, 3, *size)).astype(np.float16)
        feeds = {"x": x, "state_in.h": states["h"]}
        other, (y, _) = seconds(partial(reference.run, ["y", "state_out.h"], feeds))
        own, (outputs, new) = seconds(partial(evaluator.step, {"x": x}, states))
        worst = max(worst, float(np.abs(y.astype(np.float64) - outputs["y"]).max()))
        states = new
        if step:  # the first one plans and reads everything for the first time
            ours.append(own)
            theirs.append(other)
    return {
        "size": list(size),
        "evaluator_ms": quartiles([1e3 * value for value in ours], 2),
        "onnx_reference_ms": quartiles([1e3 * value for value in theirs], 1),
        "times_as_fast": quartiles([a / b for a, b in zip(theirs, ours, strict=True)], 1),
        "max_difference_of_y": worst,
    }


def alone(path: Path, size: tuple[int, int], steps: int) -> dict[str, Any]:
    """Seconds for 1000 steps in each arithmetic."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {"size": list(size)}
    x = {"x": rng.random((1, 3, *size))}
    for arithmetic in get_args(Arithmetic):
        evaluator = GraphEvaluator(path, arithmetic)
        states = evaluator.initial_states({"x": x["x"].shape})
        found[f"{arithmetic}_s_per_1000"] = _timed(partial(evaluator.step, x, states), steps)
    evaluator = GraphEvaluator(path, "float64")
    moved = {name: rng.standard_normal(value.shape) for name, value in states.items()}
    found["jvp_s_per_1000"] = _timed(partial(evaluator.jvp, x, states, moved), steps)
    return found


def _timed(call: Callable[[], Any], steps: int) -> list[float]:
    call()
    return quartiles([1e3 * seconds(call)[0] for _ in range(steps)], 1)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="small pictures: shows that it works")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    size, large = ((16, 24), (32, 24)) if arguments.quick else (SIZE, LARGE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "denoiser.onnx"
        model = step_model(load_checkpoint(Path(denoiser.__file__).with_name("denoiser.safetensors")))[0]
        export_onnx(model, path, family="denoiser")
        result = {
            "model": "denoiser of the zoo, float16 with a float32 state, CPU time; [25%, median, 75%]",
            "steps": arguments.steps,
            "threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
            "numpy": np.__version__,
            "onnx": onnx.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {platform.system()}",
            "against_onnx_reference": against_reference(path, size, arguments.steps),
            "alone": alone(path, large, arguments.steps),
        }
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
