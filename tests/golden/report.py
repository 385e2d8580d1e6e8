"""Write docs/families.md: every family, and what the golden cases give.

python -m tests.golden.report             all of it, some minutes
python -m tests.golden.report --families  the list of families; the measured table stays
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import onnx

from stepcell.contract import METADATA_KEY, StepContract
from stepcell.exporter import FAMILIES
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions
from tests.golden.cases import RECORDED, ROOT, Case, find_cases, worst_error

DOCUMENT = ROOT / "docs" / "families.md"
HEAD = """# Families

What `stepcell export --family NAME` knows. `--set KEY=VALUE` takes upstream's own argument names; most
are read from the tensors. `stepcell export --list-families` prints the same list.

| family | what it is | `--set` keys |
|---|---|---|
"""
CASES = """
## Equal to upstream

Vectors recorded from the public implementations, none of them run by stepcell: each checkpoint is
exported, stepped through `StepLoop` with the case's initial states and resets, and compared with
upstream in float64 at every step and in the final states. Written by `python -m tests.golden.report`;
the same comparison runs in every CI run that finds the vectors.

"Cells" counts recurrent cells that are one fused op / that are ordinary nodes (`stepcell inspect` says
why). "Engine" is the float16 file built by TensorRT-RTX, without a GPU. The float16 error is the
float16 graph with float32 states in ONNX Runtime.

| case | max error float32 | tolerance | max error float16 | cells | nodes | engine |
|---|---|---|---|---|---|---|
"""


def row(case: Case, folder: Path) -> str:
    """One line of the table."""
    worst = {precision: max(worst_error(case, folder, precision).values()) for precision in ("float32", "float16")}
    path = folder / f"{case.path.name}-float16.onnx"
    model = onnx.load(path)
    contract = StepContract.from_json(next(p.value for p in model.metadata_props if p.key == METADATA_KEY))
    fused = sum(cell.op is not None for cell in contract.cells)
    sizes = {name: array.shape[1:] if moving else array.shape for name, (array, moving) in case.inputs.items()}
    shapes = {spec.name: sizes[spec.name] for spec in contract.inputs if spec.name in sizes and contract.symbols}
    info = build_engine(path, path.with_suffix(".engine"), BuildOptions(opt_shapes=shapes))
    return (
        f"| {case.name} | {worst['float32']:.1e} | {case.tolerance:.1e} | {worst['float16']:.1e} "
        f"| {fused} / {len(contract.cells) - fused} | {len(model.graph.node)} "
        f"| {info.contents.fingerprint.plan_bytes / 1e6:.1f} MB |\n"
    )


def families() -> str:
    """The list of families."""
    text = HEAD
    for family in FAMILIES.values():
        keys = "; ".join(f"`{key}` {meaning}" for key, meaning in family.arguments.items())
        text += f"| {family.name} | {family.summary} | {keys} |\n"
    return text


def measured() -> str:
    """The table of cases, measured now."""
    text = CASES
    for case in find_cases(places=[RECORDED]):
        if case.system in FAMILIES:
            with tempfile.TemporaryDirectory() as folder:
                text += row(case, Path(folder))
            print(case.name)
    return text


def main() -> None:
    """Write the document."""
    if sys.argv[1:] == ["--families"]:
        _, heading, rest = DOCUMENT.read_text().partition("\n## Equal to upstream")
        DOCUMENT.write_text(families() + heading + rest)
    else:
        DOCUMENT.write_text(families() + measured())


if __name__ == "__main__":
    main()
