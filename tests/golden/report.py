"""Write docs/families.md: the list of families and the errors measured on the golden cases.

python -m tests.golden.report             both parts; takes some minutes
python -m tests.golden.report --families  the list of families only; the measured table stays
python -m tests.golden.report --float16   the float16 errors are measured; the rest of the table stays
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import onnx

from stepcell.contract import METADATA_KEY, StepContract
from stepcell.exporter import FAMILIES
from stepcell.renamed_families import first_name
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions
from tests.golden.cases import RECORDED, ROOT, Case, exported, find_cases, worst_error

DOCUMENT = ROOT / "docs" / "families.md"
HEAD = """# Model families

`stepcell export --family NAME` exports checkpoints of these published models. `--set KEY=VALUE` takes
upstream's own argument names; most values are inferred from the tensors. `stepcell export --list-families`
prints the same list. [adding-a-family.md](adding-a-family.md) shows how to add one.

| family | model | `--set` keys |
|---|---|---|
"""
CASES = """
## Agreement with upstream

Each case is a recorded run of the public implementation. Its checkpoint is exported, run by `StepLoop`
with the case's initial states and resets, and compared with upstream's float64 outputs at every step and
with its final states. `python -m tests.golden.report` writes this table; the test suite repeats the
comparison wherever the recorded cases are available.

"Cells" is the number of recurrent cells exported as one fused op / as ordinary nodes (`stepcell inspect`
gives the reason). "Engine" is the size of the float16 engine built by TensorRT-RTX, without a GPU. The
float16 error is that of the float16 graph with float32 states, computed as it is written (`runtime/evaluate`):
ONNX Runtime on a CPU computes float16 in float32.

| case | max error float32 | tolerance | max error float16 | cells | nodes | engine |
|---|---|---|---|---|---|---|
"""


def row(case: Case, folder: Path) -> str:
    """One line of the table."""
    paths = {precision: exported(case, folder, precision) for precision in ("float32", "float16")}
    worst = {precision: max(worst_error(case, path, precision).values()) for precision, path in paths.items()}
    path = paths["float16"]
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


def with_float16_errors(table: str) -> str:
    """The table with the float16 errors measured now; everything else stays."""
    cases = {case.name: case for case in find_cases(places=[RECORDED])}
    lines = []
    for line in table.splitlines(keepends=True):
        cells = line.split(" | ")
        case = cases.get(cells[0].removeprefix("| "))
        if case is not None:
            with tempfile.TemporaryDirectory() as folder:
                path = exported(case, Path(folder), "float16")
                cells[3] = f"{max(worst_error(case, path, 'float16').values()):.1e}"
            print(case.name, cells[3], flush=True)
        lines.append(" | ".join(cells))
    return "".join(lines)


def families() -> str:
    """First part: the list of families."""
    text = HEAD
    for family in FAMILIES.values():
        keys = "; ".join(f"`{key}` {meaning}" for key, meaning in family.arguments.items())
        if family.ignored:
            keys += "; accepted and ignored: " + ", ".join(f"`{key}`" for key in family.ignored)
        former = first_name(family.name)
        alias = "" if former == family.name else f" (alias {former})"
        text += f"| {family.name}{alias} | {family.summary} | {keys} |\n"
    return text


def measured() -> str:
    """Second part: the table of cases, measured now."""
    text = CASES
    for case in find_cases(places=[RECORDED]):
        if case.family in FAMILIES:
            with tempfile.TemporaryDirectory() as folder:
                text += row(case, Path(folder))
            print(case.name)
    return text


def main() -> None:
    """Write the document."""
    if sys.argv[1:] == ["--families"]:
        _, heading, rest = DOCUMENT.read_text().partition("\n## Agreement with upstream")
        DOCUMENT.write_text(families() + heading + rest)
    elif sys.argv[1:] == ["--float16"]:
        _, _, table = DOCUMENT.read_text().partition(CASES.splitlines()[-1] + "\n")
        DOCUMENT.write_text(families() + CASES + with_float16_errors(table))
    else:
        DOCUMENT.write_text(families() + measured())


if __name__ == "__main__":
    main()
