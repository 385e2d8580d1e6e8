"""Verify exported models of many families, and how well their error is predicted; writes one JSON file.

    python benchmarks/verify_families.py --golden ../shared/golden --output benchmarks/results/verify.json

Each kept or recorded checkpoint is exported in float16 with float32 states and verified as written against its torch
module in float64. Families named with --long also run 10^4 steps, compared with their bound, and are verified with
float16 states. The results are added to those in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from stepcell.cli.console import log
from stepcell.errors import StepcellError
from stepcell.exporter import FAMILIES, export_onnx, load_checkpoint, step_model
from stepcell.exporter.module_step import module_jvp, module_step
from stepcell.files import write_atomic
from stepcell.runtime.verify.clips import random_clip, sizes_for
from stepcell.runtime.verify.growth import error_growth
from stepcell.runtime.verify.references import as_written, in_float64
from stepcell.runtime.verify.results import Growth, failed
from stepcell.runtime.verify.stepper import FunctionStepper
from stepcell.runtime.verify.verification import Findings, Reference, VerifyOptions, verify

KEPT = Path(__file__).parent.parent / "tests" / "data" / "golden"
ZOO = Path(__file__).parent.parent / "models" / "zoo" / "denoiser.safetensors"
SMALL = 16  # height and width


def cases(golden: Path | None) -> list[tuple[str, Path, dict[str, Any]]]:
    """Name, checkpoint and settings, one of each family; the zoo's denoiser first."""
    found = [("denoiser", ZOO, {})]
    for root in filter(None, (golden, KEPT)):
        for path in sorted(root.glob("*/*/case.json")):
            family = path.parent.parent.name
            if family in FAMILIES and family not in [name for name, _, _ in found]:
                meta = json.loads(path.read_text())
                known = FAMILIES[family].arguments
                settings = {**meta["constructor"], **{k: v for k, v in meta["run_options"].items() if k in known}}
                found.append((family, path.parent / "checkpoint.pth", settings))
    return found


def look(
    family: str, checkpoint: Path, settings: dict[str, Any], folder: Path, verifying: VerifyOptions, state: str
) -> Any:
    """Export and verify one checkpoint."""
    model, _, _ = step_model(load_checkpoint(checkpoint), family, settings)
    path = folder / f"{family}-{state}.onnx"
    export_onnx(model, path, family=family, state_dtype=state)  # type: ignore[arg-type]
    subject, own = as_written(path), in_float64(path)
    contract = subject.contract
    exact = FunctionStepper(
        module_step(model, contract), contract, "torch, float64", jvp=module_jvp(model, contract), wide=True
    )
    rounded = FunctionStepper(module_step(model, contract, precision="float16"), contract, "rounded", wide=True)
    sizes = {symbol: 1 if symbol == "batch" else min(size, SMALL) for symbol, size in sizes_for(contract).items()}
    multiple = max((spec.pad_multiple for spec in contract.inputs), default=1)
    sizes = {symbol: size if size == 1 else -(-size // multiple) * multiple for symbol, size in sizes.items()}
    clip = random_clip(contract, sizes)
    found = verify(subject, Reference(exact, None, rounded), clip, verifying, in_float64=own)
    return found, subject, exact, clip


def row(found: Findings, window: int) -> dict[str, Any]:
    """What is kept of one verification; errors are rms over a state, at the last step of the window."""
    ends = {
        name: {
            each.name: {
                "measured": each.measured[-1],
                "predicted": each.predicted[-1],
                "defect": each.missed[-1] / each.measured[-1] if each.measured[-1] else 0.0,
                "explained_by_rounding": each.noise[-1] / each.measured[-1] if each.measured[-1] else 0.0,
            }
            for each in errors
        }
        for name, errors in (("still", found.warm), ("moving", found.moving))
    }
    return {
        "failed": [verdict.name for verdict in failed(found.verdicts)],
        "rho": None if found.forgetting is None else found.forgetting.rho,
        "warm_up": found.warm_up,
        "window_steps": window,
        "verdicts": {v.name: {"passed": v.passed, "value": v.value, "limit": v.limit} for v in found.verdicts},
        "window": ends,
        "bound": None if found.bound is None else found.bound.rms,
        "growth": {g.name: {"steps": g.steps, "rms": g.rms, "scale": g.scale} for g in found.growth},
    }


def short(value: Any) -> Any:
    """Floats to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: short(each) for key, each in value.items()}
    return [short(each) for each in value] if isinstance(value, (list, tuple)) else value


def main() -> int:
    """Verify, write, and say how many passed."""
    parser = argparse.ArgumentParser(description="Verify exported models of many families.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/verify.json"))
    parser.add_argument("--golden", type=Path, help="folder of recorded cases beside those that are kept")
    parser.add_argument("--window", type=int, default=100, help="steps of the warm window")
    parser.add_argument("--families", nargs="*", help="only these")
    parser.add_argument("--long", nargs="*", default=[], help="families to run for --long-steps as well")
    parser.add_argument("--long-steps", type=int, default=10_000)
    options = parser.parse_args()
    result: dict[str, Any] = {"size": SMALL, "families": {}}
    if options.output.is_file():
        result = json.loads(options.output.read_text())
    verifying = VerifyOptions(steps=100, still=512, window=options.window, warm_seconds=60)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family, checkpoint, settings in cases(options.golden):
            if options.families and family not in options.families:
                continue
            entry: dict[str, Any] = {}
            try:
                found, subject, exact, clip = look(family, checkpoint, settings, folder, verifying, "float32")
                entry = row(found, options.window)
                if family in options.long:
                    growth = error_growth(subject, exact, clip, options.long_steps)
                    entry["long"] = over_the_bound(found, growth, options.long_steps)
                    narrow, *_ = look(family, checkpoint, settings, folder, verifying, "float16")
                    entry["float16_state"] = row(narrow, options.window)
            except StepcellError as error:
                entry["error"] = error.message
            result["families"][family] = entry
            log(f"{family}: {entry.get('error') or entry['failed'] or 'passed'}")
            write_atomic(options.output, json.dumps(short(result), indent=1) + "\n")
    passed = sum(not entry.get("failed", ["error"]) for entry in result["families"].values())
    sys.stdout.write(f"{passed} of {len(result['families'])} passed\n")
    return 0


def over_the_bound(found: Findings, growth: tuple[Growth, ...], steps: int) -> dict[str, Any]:
    """Largest error of a long run, and as a part of the bound that was derived before it."""
    measured = {each.name: max(each.rms) for each in growth}
    bound = None if found.bound is None else found.bound.rms
    ratios = {} if bound is None else {name: measured[name] / limit for name, limit in bound.items() if limit}
    return {"steps": steps, "measured": measured, "of_the_bound": ratios}


if __name__ == "__main__":
    sys.exit(main())
