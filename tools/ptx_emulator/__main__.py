"""Emulate every kernel with every tile: `make kernels-emulate`, about fifteen minutes on two cores.

Writes benchmarks/results/emulated.json: per cell, compute capability and combination of tiles the worst
difference to float64 over the steps, relative to max(1, |value|), or the reason why the emulator stopped. The PTX
for 8.0, 8.6 and 8.9 is the same as for 8.7, and for 10.0 the same as for 11.0 (tests/plugins/kernels/test_ptx.py).
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import torch
import triton

from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.store import wanted
from stepcell.plugins.kernels.tiles import Tile
from tools.kernel_steps import CELLS, TOLERANCE, Steps
from tools.ptx_emulator.driver import EmulatedDriver
from tools.ptx_emulator.launch import CAPABILITIES, Emulated
from tools.ptx_emulator.program import Fault

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "emulated.json"
SIZE, STEPS = (1, 5, 13), 3  # 65 pixels, which no tile divides
PIXELS = 300  # expected pixels that tiles are chosen for: few enough that long loops are split


def emulate(label: str, capability: str) -> dict[str, float | str]:
    """Run a cell with every tile of its kernels: the first of each kernel together, then the second, and so on."""
    cell = next(cell for cell, _ in CELLS if cell.label == label)
    all_tiles: dict[str, list[Tile]] = {}
    for kernel, tile in wanted(cell, capability, PIXELS):
        all_tiles.setdefault(kernel, []).append(tile)
    found: dict[str, float | str] = {}
    for number in range(max(map(len, all_tiles.values()))):
        tiles = {kernel: each[number % len(each)] for kernel, each in all_tiles.items()}
        driver = EmulatedDriver()
        sys.modules["cuda.bindings.driver"] = driver
        launch = Emulated(capability, driver).launch
        names = ", ".join(f"{kernel} {tile.label}" for kernel, tile in tiles.items())
        try:
            worst = Steps(cell, SIZE, tiles, launch, fp16_mirror=False).run(STEPS)
            found[names] = float(f"{max(worst.values()):.2e}")
        except Fault as error:
            found[names] = str(error)
    return found


def main() -> int:
    """Emulate everything and write the result; returns 1 if a combination of tiles is wrong."""
    torch.set_num_threads(1)
    work = [(cell.label, capability) for capability in CAPABILITIES for cell, _ in CELLS]
    worst: dict[str, dict[str, dict[str, float | str]]] = {}
    wrong = 0
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for (label, capability), found in zip(work, pool.starmap(emulate, work, chunksize=1), strict=True):
            limit = TOLERANCE[CellConfig.from_label(label).state_dtype]
            bad = {names: result for names, result in found.items() if isinstance(result, str) or not result <= limit}
            print(f"{capability:>4}  {label}: {len(found)} choices of tiles, {bad or 'all good'}")
            worst.setdefault(label, {})[capability] = found
            wrong += len(bad)
    versions = {"triton": triton.__version__, "numpy": np.__version__, "torch": torch.__version__}
    about = {"date": str(datetime.date.today()), "versions": versions, "size": SIZE, "steps": STEPS}
    RESULT.write_text(json.dumps({**about, "tolerance": TOLERANCE, "worst": worst}, indent=1) + "\n")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
