"""Verify exported models of many families, and how well their error is predicted; writes one JSON file.

    python benchmarks/verify_families.py --golden ../shared/golden --output benchmarks/results/verify.json

For every kept or recorded checkpoint: exported in float16 with float32 states, verified as written against its torch
module in float64. For the families named with --long also a run of 10^4 steps against the bound, and the same file with
float16 states.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from stepcell.cli.console import log
from stepcell.errors import StepcellError
from stepcell.exporter import FAMILIES, export_onnx, load_checkpoint, step_model
from stepcell.exporter.reference import module_jvp, module_step
from stepcell.files import write_atomic
from stepcell.runtime.verify.clips import random_clip, sizes_for
from stepcell.runtime.verify.growth import error_growth
from stepcell.runtime.verify.references import as_written, in_float64
from stepcell.runtime.verify.results import Growth, failed
from stepcell.runtime.verify.stepper import FunctionStepper
from stepcell.runtime.verify.verification import Findings, Plan, Reference, verify

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


def look(family: str, checkpoint: Path, settings: dict[str, Any], folder: Path, plan: Plan, state: str) -> Any:
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
    found = verify(subject, Reference(exact, None, rounded), clip, plan, in_float64=own)
    return found, subject, exact, clip


def row(found: Findings, seconds: float) -> dict[str, Any]:
    """What is kept of one verification."""
    ends = {
        window: {
            each.name: {
                "measured": each.measured[-1],
                "predicted": each.predicted[-1],
                "defect": each.missed[-1] / each.measured[-1] if each.measured[-1] else 0.0,
                "explained_by_rounding": each.noise[-1] / each.measured[-1] if each.measured[-1] else 0.0,
            }
            for each in errors
        }
        for window, errors in (("still", found.warm), ("moving", found.moving))
    }
    return {
        "seconds": round(seconds, 1),
        "failed": [verdict.name for verdict in failed(found.verdicts)],
        "verdicts": [msgspec.to_builtins(verdict) for verdict in found.verdicts],
        "rho": None if found.forgetting is None else found.forgetting.rho,
        "bound": None if found.bound is None else found.bound.rms,
        "warm_up": found.warm_up,
        "window": ends,
        "growth": [msgspec.to_builtins(each) for each in found.growth],
    }


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
    result: dict[str, Any] = {"window": options.window, "size": SMALL, "families": {}}
    plan = Plan(steps=100, still=512, window=options.window, warm_seconds=60)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family, checkpoint, settings in cases(options.golden):
            if options.families and family not in options.families:
                continue
            entry: dict[str, Any] = {}
            try:
                started = time.perf_counter()
                found, subject, exact, clip = look(family, checkpoint, settings, folder, plan, "float32")
                entry = row(found, time.perf_counter() - started)
                if family in options.long:
                    growth = error_growth(subject, exact, clip, options.long_steps)
                    entry["long"] = over_the_bound(found, growth, options.long_steps)
                    narrow, *_ = look(family, checkpoint, settings, folder, plan, "float16")
                    entry["float16_state"] = row(narrow, 0.0)
            except StepcellError as error:
                entry["error"] = error.message
            result["families"][family] = entry
            log(f"{family}: {entry.get('error') or entry['failed'] or 'passed'}")
            write_atomic(options.output, json.dumps(result, indent=1) + "\n")
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
