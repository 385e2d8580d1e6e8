"""Run every tool and runtime in a child process, bring contracts back, write the JSON and docs/interop.md.

`python -m tools.interop PYTHON`, where PYTHON has the packages of tools/interop/requirements.txt.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from stepcell import __version__, fuse
from stepcell.errors import StepcellError
from stepcell.exporter import export_onnx, load_checkpoint, step_model
from stepcell.onnx_model import changes_since_export, contract_text, read_onnx

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "interop.json"
PAGE = REPOSITORY / "docs" / "interop.md"
CHECKPOINT = REPOSITORY / "models" / "zoo" / "denoiser.safetensors"
SHAPE = (1, 3, 64, 96)
STEPS = 20
SECONDS = 300

# How the page calls them, and the package whose version it gives.
EDITORS = {
    "onnxsim": ("onnxsim `simplify`", "onnxsim"),
    "onnxslim": ("onnxslim `slim`", "onnxslim"),
    "graphsurgeon": ("graphsurgeon import, clean up, sort, export", "onnx-graphsurgeon"),
    "polygraphy": ("`polygraphy surgeon sanitize --fold-constants`", "polygraphy"),
    "extract_model": ("`onnx.utils.extract_model`", "onnx"),
    "add_prefix": ("`onnx.compose.add_prefix`", "onnx"),
    "inline": ("`onnx.inliner.inline_local_functions`", "onnx"),
    "to_opset_22": ("`onnx.version_converter` to opset 22", "onnx"),
    "to_opset_17": ("`onnx.version_converter` to opset 17", "onnx"),
    "float16_keeping_io": ("onnxconverter-common float16, `keep_io_types`", "onnxconverter-common"),
    "float16_whole": ("onnxconverter-common float16", "onnxconverter-common"),
    "transformers_float16": ("ONNX Runtime's transformers float16, `keep_io_types`", "onnxruntime"),
    "quantize_dynamic": ("ONNX Runtime `quantize_dynamic`", "onnxruntime"),
    "ort_basic": ("ONNX Runtime, saved at `ORT_ENABLE_BASIC`", "onnxruntime"),
    "ort_all": ("ONNX Runtime, saved at `ORT_ENABLE_ALL`", "onnxruntime"),
}
RUNTIMES = {"openvino": "OpenVINO", "tract": "tract", "ncnn": "ncnn, through pnnx", "iree": "IREE"}


def run_child(python: str, tool: str, source: Path, target: Path) -> str:
    """Run a tool; the last line of what it says where it fails, empty where it succeeds."""
    command = [python, str(Path(__file__).with_name("tools.py")), tool, str(source), str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"did not end within {SECONDS} s"
    if done.returncode == 0 and target.is_file():
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return (lines[-1] if lines else f"exit code {done.returncode}")[:200]


def edited(python: str, tool: str, original: Path, folder: Path) -> dict[str, Any]:
    """What a tool keeps of a file, and what `fuse --contract` makes of the result."""
    target, repaired = folder / f"{tool}.onnx", folder / f"{tool}.repaired.onnx"
    failed = run_child(python, tool, original, target)
    if failed:
        return {"failed": failed}
    model, before = onnx.load(target), onnx.load(original)
    contract = contract_text(model) is not None
    ports = [value.name for value in (*model.graph.input, *model.graph.output)]
    result: dict[str, Any] = {
        "contract": contract,
        "functions": len(model.functions) == len(before.functions),
        "names": ports == [value.name for value in (*before.graph.input, *before.graph.output)],
        "changed": changes_since_export(read_onnx(target, check=False)) if contract else None,
    }
    try:
        report = fuse(target, repaired, contract=original, tolerance=0.3)
    except StepcellError as error:
        return {**result, "repair": error.message}
    parity = report.contract.parity
    assert parity is not None
    kept = parity == read_onnx(original).contract.parity
    return {
        **result,
        "repair": "",
        "error": 0.0 if kept else max(parity.max_abs_error.values()),
        "cells": [cell.op for cell in report.contract.cells],
        "notes": list(report.notes),
    }


def stepped(python: str, runtime: str, path: Path, folder: Path) -> dict[str, Any]:
    """The largest difference of a runtime to ONNX Runtime over `STEPS` fed-back steps."""
    frames = np.random.default_rng(0).random((STEPS, *SHAPE), np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    contract = read_onnx(path).contract
    sizes = contract.state_shapes(contract.bind({"x": SHAPE}))
    states = {state.name: state.initial(sizes[state.name]) for state in contract.states}
    np.savez(f"{path}.npz", frames=frames, **states)  # type: ignore[arg-type]
    target = folder / f"{path.stem}.{runtime}.npz"
    failed = run_child(python, runtime, path, target)
    if failed:
        return {"failed": failed}
    found, worst = np.load(target), 0.0
    for step, frame in enumerate(frames):
        feeds = {"x": frame, **{state.input: states[state.name] for state in contract.states}}
        outputs = session.run(None, feeds)
        states = {state.name: new for state, new in zip(contract.states, outputs[-len(states) :], strict=True)}
        for index, output in enumerate(outputs):
            worst = max(worst, float(np.abs(found[f"output{index}"][step] - output).max()))
    return {"failed": "", "error": worst}


def versions_of(python: str) -> dict[str, str]:
    """Versions of the packages in the tools' environment."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)
    installed = {name.lower().replace("_", "-"): version for name, version in found.items()}
    lines = Path(__file__).with_name("requirements.txt").read_text().splitlines()
    asked = sorted(line.partition("==")[0] for line in lines if "==" in line and not line.startswith("#"))
    return {name: installed[name] for name in asked}


def main(python: str) -> None:
    with tempfile.TemporaryDirectory(prefix="stepcell-interop-") as name:
        folder = Path(name)
        model, _, _ = step_model(load_checkpoint(CHECKPOINT), None, {}, {})
        files = {}
        for label, plain, fixed in (("exported", False, True), ("plain", True, True), ("plain, dynamic", True, False)):
            files[label] = folder / f"{label.replace(', ', '_')}.onnx"
            shapes = {"x": SHAPE} if fixed else {}
            export_onnx(model, files[label], precision="float32", plain=plain, shapes=shapes, family="denoiser")
        original = folder / "original.onnx"
        export_onnx(model, original, precision="float32", family="denoiser")
        results = {
            "date": datetime.now(timezone.utc).date().isoformat(),
            "stepcell": __version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "versions": versions_of(python),
            "model": "the zoo's denoiser in float32",
            "editors": {tool: edited(python, tool, original, folder) for tool in EDITORS},
            "runtimes": {
                tool: {label: stepped(python, tool, path, folder) for label, path in files.items()} for tool in RUNTIMES
            },
        }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)


def write_page(results: dict[str, Any]) -> None:
    """Write both tables into the page, between their marks."""
    text = PAGE.read_text()
    for mark, lines in (("editors", editor_table(results)), ("runtimes", runtime_table(results))):
        start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        before, _, rest = text.partition(start)
        text = before + start + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    PAGE.write_text(text)


def editor_table(results: dict[str, Any]) -> Sequence[str]:
    yes = {True: "kept", False: "**lost**"}
    lines = [
        "| tool | contract | op's function | names | `inspect` | after `fuse --contract` |",
        "|---|---|---|---|---|---|",
    ]
    for tool, found in results["editors"].items():
        title, package = EDITORS[tool]
        name = f"{title}, {results['versions'][package]}"
        if "failed" in found:
            lines.append(f"| {name} | fails: {found['failed']} | | | | |")
            continue
        inspected = "no contract" if found["changed"] is None else "changed" if found["changed"] else "unchanged"
        repair = found["repair"]
        if not repair:
            cells = sum(op is not None for op in found["cells"])
            error = "equal bit by bit" if found["error"] == 0 else f"error {found['error']:.1e}"
            repair = f"{error}; {'op' if cells else 'cell in standard nodes'}"
        kept = " | ".join(yes[found[key]] for key in ("contract", "functions", "names"))
        lines.append(f"| {name} | {kept} | {inspected} | {repair} |")
    return lines


def runtime_table(results: dict[str, Any]) -> Sequence[str]:
    labels = list(next(iter(results["runtimes"].values())))
    lines = [f"| runtime | {' | '.join(labels)} |", "|---" * (len(labels) + 1) + "|"]
    for tool, found in results["runtimes"].items():
        version = next(v for name, v in results["versions"].items() if name.startswith(tool))
        cells = [f"error {each['error']:.1e}" if not each["failed"] else "refused" for each in found.values()]
        lines.append(f"| {RUNTIMES[tool]}, {version} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main(sys.argv[1])
