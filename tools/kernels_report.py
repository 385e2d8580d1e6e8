"""Report of the compiled kernels: registers, shared memory, spills and code size for every GPU.

    python -m tools.kernels_report            compile everything, rewrite the report and the table in docs/plugin.md
    python -m tools.kernels_report --check    compile the default tiles for 8.7 and compare with the report

Shows the effect of a changed kernel or another Triton version before it runs on a device.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stepcell.errors import StepcellError, UsageError
from stepcell.files import read_bytes, write_atomic
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.compile import CAPABILITIES, compile_kernel
from stepcell.plugins.kernels.image import KernelImage
from stepcell.plugins.kernels.store import images_for, wanted
from stepcell.plugins.kernels.typical import TYPICAL

__all__ = ["CHECKED", "REPORT", "check", "make_report", "table"]

logger = logging.getLogger(__name__)

REPORT = Path(__file__).parents[1] / "benchmarks" / "results" / "compiled_kernels.json"
CHECKED = "8.7"  # Orin, the GPU the project is for first

_COLUMNS = ["registers", "shared_bytes", "tensor_core_instructions", "spill_instructions", "cubin_bytes"]
_MARKS = ("<!-- kernels: made by make kernels-report -->\n", "<!-- end -->\n")


def make_report(capabilities: Iterable[str]) -> dict[str, Any]:
    """Compile every typical cell with every tile for these GPUs.

    Returns:
        {"triton": version, "columns": [...], "kernels": {"cell kernel tile": {"8.7": [...]}}}
    """
    rows: dict[str, dict[str, list[int]]] = {}
    version = ""
    with tempfile.TemporaryDirectory() as folder:
        for capability in capabilities:
            for cell, pixels in TYPICAL:
                for image in images_for(cell, capability, Path(folder), pixels):
                    rows.setdefault(_name(cell, image), {})[capability] = _row(image)
                    version = image.info.triton
                logger.info(f"{capability:>4}  {cell.label}")
    return {"triton": version, "columns": _COLUMNS, "kernels": rows}


def check(capability: str = CHECKED) -> list[str]:
    """Compile the default tiles and compare with the report; returns one sentence per difference.

    Registers and sizes depend on the compiler: with another Triton version than the report's, only spills and missing
    tensor-core instructions are reported.
    """
    report = json.loads(read_bytes(REPORT))
    problems, seen = [], set()
    for cell, pixels in TYPICAL:
        for kernel, tile in wanted(cell, capability, pixels):
            if (cell, kernel) in seen:
                continue  # not the default tile
            seen.add((cell, kernel))
            image = compile_kernel(kernel, cell, tile, capability)
            name, row = _name(cell, image), _row(image)
            logger.info(f"{capability:>4}  {name}")
            if image.info.spill_instructions:
                problems.append(f"{name} for {capability} spills: {image.info.spill_instructions} stack accesses")
            if kernel != "narrow_state" and not image.info.tensor_core_instructions:
                problems.append(f"{name} for {capability} has no tensor-core instruction")
            reported = report["kernels"].get(name, {}).get(capability)
            if image.info.triton == report["triton"] and row != reported:
                problems.append(f"{name} for {capability}: {_COLUMNS} are {row}, the report has {reported}")
    return problems


def _name(cell: CellConfig, image: KernelImage) -> str:
    return f"{cell.label} {image.info.kernel} {image.info.tile}"


def _row(image: KernelImage) -> list[int]:
    info = image.info
    return [
        info.registers,
        info.shared_bytes,
        info.tensor_core_instructions,
        info.spill_instructions,
        len(image.cubin),
    ]


def table(report: dict[str, Any]) -> str:
    """The default tiles as a Markdown table: registers and KiB of shared memory per GPU."""
    lines = [
        "| cell, kernel | " + " | ".join(CAPABILITIES) + " |",
        "|---|" + "---|" * len(CAPABILITIES),
    ]
    for cell, pixels in TYPICAL:
        for kernel in dict.fromkeys(kernel for kernel, _ in wanted(cell, CAPABILITIES[0], pixels)):
            cells = []
            for capability in CAPABILITIES:
                tile = next(t for k, t in wanted(cell, capability, pixels) if k == kernel)
                registers, shared, *_ = report["kernels"][f"{cell.label} {kernel} {tile.label}"][capability]
                cells.append(f"{registers}r {-(-shared // 1024)}K")
            lines.append(f"| {cell.label}, {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _write(report: dict[str, Any], document: Path) -> None:
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in report["kernels"].items())
    head = f'{{"triton": {json.dumps(report["triton"])},\n"columns": {json.dumps(report["columns"])},\n'
    write_atomic(REPORT, f'{head}"kernels": {{\n{rows}\n}}}}\n')
    before, _, rest = read_bytes(document).decode().partition(_MARKS[0])
    _, mark, after = rest.partition(_MARKS[1])
    if not mark:
        raise UsageError(f"{document}: has no place for the table", hint="it stands between two comment lines")
    write_atomic(document, before + _MARKS[0] + table(report) + _MARKS[1] + after)


def main() -> int:
    """The command of `make kernels-report`; returns the exit code."""
    parser = argparse.ArgumentParser(description="Report of the compiled kernels.")
    parser.add_argument("--check", action="store_true", help="compile the default tiles for one GPU and compare")
    parser.add_argument("--document", type=Path, default=Path("docs/plugin.md"), help="where the table stands")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.check:
            problems = check()
            for problem in problems:
                logger.error(f"error: {problem}")
            return 1 if problems else 0
        _write(make_report(CAPABILITIES), arguments.document)
    except StepcellError as error:
        logger.error(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
