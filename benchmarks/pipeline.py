"""`stepcell run` of this version against another one: frames per second of a 1080p clip through one convolution.

The convolution is of 1x1 pixels, so that what happens around the step is measured.

    pip install --no-deps --target build/other FOLDER_OR_WHEEL
    python benchmarks/pipeline.py --other build/other

Each version runs in a process of its own. In every round both run the same case one after the other, in an order that
changes from round to round, and ratios are taken within rounds. The clip is read from a video and from an array, and
the results go nowhere, into an array or into a video. Of the cases of NV12, this version runs the model with the
conversion of pixels in its graph, and the other one, which may not know it, the model of floats.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from stepcell.contract import METADATA_KEY, StepContract, TensorSpec
from stepcell.errors import StepcellError
from stepcell.exporter.step_onnx.pixels_in_graph.check import with_pixels_in_graph
from stepcell.files import write_atomic
from stepcell.nv12 import Nv12
from stepcell.runtime.media.open_sink import open_sink

__all__ = ["main", "svg"]

SIZE, FRAMES = (1920, 1080), 30
QUICK_SIZE, QUICK_FRAMES = (64, 48), 6
FLOATS, NV12 = "model.onnx", "nv12.onnx"
SINKS = ("", "out.npy", "out.mkv")
CASES = [(FLOATS, source, sink) for source in ("clip.mp4", "clip.npy") for sink in SINKS]
CASES += [(NV12, "clip.mp4", sink) for sink in SINKS]
OURS, OTHER = "this version", "the other version"


class Version:
    """A process that runs `stepcell run` of one version.

    Args:
        name: for messages.
        path: PYTHONPATH of the process; None: that of this one.
    """

    def __init__(self, name: str, path: Path | None) -> None:
        self.name = name
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("pipeline_runs.py"))],
            env=os.environ if path is None else os.environ | {"PYTHONPATH": str(path.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, folder: Path, model: str, source: str, sink: str, threads: int, frames: int) -> dict[str, float]:
        """Run one case; returns frames per second, and milliseconds of CPU time per frame."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps([str(folder), model, source, sink, threads, frames]) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise StepcellError(f"the process of {self.name} ended with {self._child.wait()}")
        found: dict[str, float] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process."""
        self._child.communicate()


def make_inputs(folder: Path, size: tuple[int, int], count: int) -> None:
    """Write the model in both forms, and the clip as a video and as an array of pixels."""
    picture = {"dtype": "float32", "shape": ("batch", 3, "height", "width"), "layout": "NCHW", "range": (0.0, 1.0)}
    x, y = (TensorSpec(name=name, **picture) for name in "xy")  # type: ignore[arg-type]
    contract = StepContract(inputs=(x,), outputs=(y,), states=(), precision="float32")
    weight = np.full((3, 3, 1, 1), 1 / 3, np.float32)  # to grey
    info = [helper.make_tensor_value_info(spec.name, onnx.TensorProto.FLOAT, spec.shape) for spec in (x, y)]
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "grey", info[:1], info[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, contract.to_json()
    onnx.save(model, folder / FLOATS)
    with_nv12, _ = with_pixels_in_graph(model, contract, Nv12(matrix="bt709", range="limited"))  # as of the clip
    onnx.save(with_nv12, folder / NV12)
    frames = [_frame(size, number) for number in range(count)]
    np.save(folder / "clip.npy", np.stack(frames))
    sink = open_sink(str(folder / "clip.mp4"), Fraction(25))
    for frame in frames:
        sink.write(frame)
    sink.close()


def _frame(size: tuple[int, int], number: int) -> NDArray[np.uint8]:
    """A moving gradient with some noise, as of a camera."""
    width, height = size
    x, y = np.arange(width), np.arange(height)[:, None]
    noise = np.random.default_rng(number).integers(0, 6, (height, width, 3))
    planes = [(x + y + 7 * number) % 250, (2 * x + 3 * number) % 250 + 0 * y, (x // 2 + 2 * y + number) % 250]
    pixels: NDArray[np.uint8] = (np.stack(planes, axis=2) + noise).astype(np.uint8)
    return pixels


def measure(other: Path, *, rounds: int, threads: int, quick: bool) -> dict[str, Any]:
    """Both versions in all cases; the result as it is written."""
    import onnxruntime

    size, count = (QUICK_SIZE, QUICK_FRAMES) if quick else (SIZE, FRAMES)
    versions = [Version(OURS, None), Version(OTHER, other)]
    cases = [{"model": model, "input": source, "output": sink, OURS: [], OTHER: []} for model, source, sink in CASES]
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name), size, count)
        for number, case in itertools.product(range(-1, rounds), cases):  # the first round warms up
            for version in versions if number % 2 else versions[::-1]:
                model = str(case["model"]) if version.name == OURS else FLOATS
                found = version.run(Path(name), model, str(case["input"]), str(case["output"]), threads, count)
                if number >= 0:
                    case[version.name].append(found)  # type: ignore[attr-defined]
            log(f"round {number + 1} of {rounds}: {_title(case)}")
    for version in versions:
        version.close()
    return {
        "size": size, "frames": count, "threads": threads, "rounds": rounds, "cases": cases,
        "load_before": load, "load_after": os.getloadavg()[0],
        "cpu": _cpu(), "cores": os.cpu_count(),
        "versions": {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()},
    }  # fmt: skip


def ratios(case: dict[str, Any], key: str) -> NDArray[np.float64]:
    """This version to the other one, in each round."""
    ours, other = (np.array([each[key] for each in case[name]], np.float64) for name in (OURS, OTHER))
    return ours / other


def table(result: dict[str, Any]) -> str:
    """Markdown: for each case the frames per second of both, and the ratios with their quartiles."""
    lines = [
        "| from, to | frames/s: other | this | ratio (quartiles) | CPU time: other | this | ratio |",
        "|---" * 7 + "|",
    ]
    for case in result["cases"]:
        fps = [float(np.median([each["fps"] for each in case[name]])) for name in (OTHER, OURS)]
        cpu = [float(np.median([each["cpu_ms"] for each in case[name]])) for name in (OTHER, OURS)]
        low, middle, high = np.percentile(ratios(case, "fps"), [25, 50, 75])
        lines.append(
            f"| {_title(case)} | {fps[0]:.1f} | {fps[1]:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) "
            f"| {cpu[0]:.1f} ms | {cpu[1]:.1f} ms | {np.median(ratios(case, 'cpu_ms')):.2f} |"
        )
    return "\n".join(lines) + "\n"


def svg(result: dict[str, Any]) -> str:
    """Bar plot of the ratios of the frame rates, with quartiles."""
    left, scale, step = 190, 180, 24
    height = 70 + step * len(result["cases"])
    conditions = (
        f"{result['cpu']}, {result['cores']} cores, {result['threads']} threads, {result['rounds']} rounds; load "
        f"average {result['load_before']:.1f} before, {result['load_after']:.1f} after"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" font-family="sans-serif"'
        ' font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="4" y="20" font-size="15">Frames per second of a {result["size"][0]}x{result["size"][1]} clip, the '
        "other version = 1 (median and quartiles)</text>",
        f'<text x="4" y="38" fill="#666">{escape(conditions)}</text>',
        f'<line x1="{left + scale}" x2="{left + scale}" y1="48" y2="{height - 8}" stroke="#4a6fa5" '
        'stroke-dasharray="3 3"/>',
    ]
    for number, case in enumerate(result["cases"]):
        y = 54 + step * number
        low, middle, high = (float(each) for each in np.percentile(ratios(case, "fps"), [25, 50, 75]))
        lines += [
            f'<text x="4" y="{y + 12}">{escape(_title(case))}</text>',
            f'<rect x="{left}" y="{y}" width="{middle * scale:.1f}" height="15" fill="#76b900"/>',
            f'<line x1="{left + low * scale:.1f}" x2="{left + high * scale:.1f}" y1="{y + 7}" y2="{y + 7}" '
            'stroke="black"/>',
            f'<text x="{left + high * scale + 6:.1f}" y="{y + 12}">{middle:.2f}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _title(case: dict[str, Any]) -> str:
    return f"{case['input']} to {case['output'] or 'nothing'}{' (NV12)' * (case['model'] == NV12)}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def log(line: str) -> None:
    sys.stderr.write(line + "\n")


def main() -> int:
    """Measure and write the result; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time stepcell run of this version and of another one, on the CPU.")
    parser.add_argument("--other", type=Path, metavar="FOLDER", help="with the package stepcell of another version")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/pipeline.json"), help="JSON; .svg beside it"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2, help="of the steps")
    parser.add_argument("--quick", action="store_true", help="one round of a tiny clip")
    arguments = parser.parse_args()
    if arguments.other is None:
        parser.error("--other FOLDER is missing: pip install --no-deps --target FOLDER OTHER_CHECKOUT")
    try:
        rounds = 1 if arguments.quick else arguments.rounds
        result = measure(arguments.other, rounds=rounds, threads=arguments.threads, quick=arguments.quick)
        write_atomic(arguments.output, json.dumps(result, indent=1) + "\n")
        write_atomic(arguments.output.with_suffix(".svg"), svg(result))
    except StepcellError as error:
        log(str(error))
        return error.exit_code
    sys.stdout.write(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
