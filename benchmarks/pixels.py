"""Benchmark of pixels converted in the graph (`--pixels uint8`) against pixels converted on the host, on the CPU.

A model of one 3x3 convolution is exported in both forms. For frames of 1920x1080, turn by turn, so that other load on
the machine affects all alike: the conversion of a frame and of a picture as `stepcell run` does them, and the step in
ONNX Runtime, of each form. CPU time of the process is measured, which leaves out the time of other programs; ratios are
taken within rounds. On a GPU the conversion in the graph costs the host nothing; here it runs on the same cores.

    python benchmarks/pixels.py --output benchmarks/results/pixels.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepcell import StepLoop
from stepcell.contract import TensorSpec
from stepcell.exporter import export_onnx
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.postprocess import OutputPostprocessor
from stepcell.runtime.media.preprocess import Preprocessor

SIZE = (1080, 1920)
WARM_UP = 3
FORMS = ("float", "uint8")
_BAR, _LEFT, _WIDTH = 16, 250, 420
_COLOURS = {"float": "#4a6fa5", "uint8": "#76b900"}


class OneConvolution(nn.Module):
    """Step model without a state: x (batch, 3, height, width) RGB in [0, 1] -> y of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        image = ("batch", 3, "height", "width")
        self.inputs = [TensorSpec(name="x", shape=image, layout="NCHW", range=(0.0, 1.0))]
        self.outputs = [TensorSpec(name="y", shape=image, layout="NCHW", range=(0.0, 1.0))]
        self.states: list[Any] = []
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.convolution(x),)


@dataclass
class Form:
    """One form of the model, with what `stepcell run` converts its frames and pictures with."""

    loop: StepLoop
    preprocessor: Preprocessor
    postprocessor: OutputPostprocessor
    tensor: NDArray[Any]

    def host(self, frame: NDArray[np.uint8], picture: NDArray[Any]) -> None:
        """Convert a frame and a picture."""
        self.preprocessor(frame, self.tensor)
        self.postprocessor.check(picture, self.preprocessor)
        self.postprocessor(picture, self.preprocessor)


def seconds(call: Callable[[], object]) -> float:
    """CPU time of a call in all threads."""
    started = time.process_time()
    call()
    return time.process_time() - started


def measure(folder: Path, rounds: int, size: tuple[int, int], threads: int) -> dict[str, Any]:
    """Times in milliseconds by form, round by round, and the bytes that a step is handed and returns."""
    torch.manual_seed(0)
    model = OneConvolution()
    rng = np.random.default_rng(0)
    clip = [rng.integers(0, 256, (*size, 3), np.uint8) for _ in range(3)]
    forms: dict[str, Form] = {}
    for name in FORMS:
        path = folder / f"{name}.onnx"
        export_onnx(model, path, precision="float32", pixel_dtype="float" if name == "float" else "uint8")
        loop = StepLoop.open(path, threads=threads)
        sink = open_sink(str(folder / f"{name}.mkv"), Fraction(25))
        preprocessor = Preprocessor(loop.contract.inputs[0], clip[0])
        forms[name] = Form(loop, preprocessor, OutputPostprocessor(loop.contract, sink), preprocessor(clip[0]))
        sink.abandon()
    times: dict[str, dict[str, list[float]]] = {name: {"host": [], "step": []} for name in FORMS}
    handed: dict[str, dict[str, int]] = {}
    for turn in range(rounds + WARM_UP):
        frame = clip[turn % len(clip)]
        for name in FORMS if turn % 2 else FORMS[::-1]:
            form, outputs = forms[name], {}
            tensor = form.preprocessor(frame, form.tensor)
            step = seconds(lambda form=form, tensor=tensor, outputs=outputs: outputs.update(form.loop.step(x=tensor)))
            host = seconds(lambda form=form, frame=frame, outputs=outputs: form.host(frame, outputs["y"]))
            handed[name] = {"in": tensor.nbytes, "out": sum(array.nbytes for array in outputs.values())}
            if turn >= WARM_UP:
                times[name]["host"].append(round(host * 1e3, 3))
                times[name]["step"].append(round(step * 1e3, 3))
    for form in forms.values():
        form.loop.close()
    return {"milliseconds": times, "bytes": handed}


def rows(result: dict[str, Any]) -> list[tuple[str, str, float]]:
    """What, form and median of each bar of the plot."""
    found = []
    for what, text in (("host", "converting on the host"), ("step", "step"), ("both", "both")):
        for name in FORMS:
            times = result["milliseconds"][name]
            each = np.add(times["host"], times["step"]) if what == "both" else np.array(times[what])
            found.append((text, name, float(np.median(each))))
    return found


def svg(result: dict[str, Any]) -> str:
    """Bars of the CPU time of a frame, by form."""
    bars = rows(result)
    longest = max(value for _, _, value in bars)
    height = 70 + len(bars) * (_BAR + 6)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 90}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="4" y="20" font-size="15">CPU time of a frame, pixels converted on the host or in the graph, ms'
        "</text>",
        f'<text x="4" y="40" fill="#666">{escape(conditions(result))}</text>',
    ]
    for number, (text, name, value) in enumerate(bars):
        top = 56 + number * (_BAR + 6)
        width = value / longest * _WIDTH
        lines += [
            f'<text x="4" y="{top + 12}">{escape(text)}, {name}</text>',
            f'<rect x="{_LEFT}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="{_COLOURS[name]}"/>',
            f'<text x="{_LEFT + width + 5:.1f}" y="{top + 12}">{value:.3g}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def conditions(result: dict[str, Any]) -> str:
    """Machine, versions, size and rounds, in a line."""
    height, width = result["size"]
    return (
        f"{width}x{height}, one 3x3 convolution, {result['threads']} thread(s), median of {result['rounds']} rounds; "
        f"{result['machine']}, ONNX Runtime {result['onnxruntime']}"
    )


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small frames: shows that it works, not how fast it is")
    parser.add_argument("--output", type=Path, help="JSON, with a plot beside it; stdout by default")
    options = parser.parse_args()
    size = (54, 96) if options.quick else SIZE
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), options.rounds, size, options.threads)
    result = {
        "size": size,
        "rounds": options.rounds,
        "threads": options.threads,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "ratios_of_medians": {},
        **measured,
    }
    medians = {(text, name): value for text, name, value in rows(result)}
    result["ratios_of_medians"] = {
        text: round(medians[text, "float"] / max(medians[text, "uint8"], 1e-6), 2) for text, _ in medians
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text)
        options.output.with_suffix(".svg").write_text(svg(result))


if __name__ == "__main__":
    main()
