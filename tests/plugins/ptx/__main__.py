"""Every kernel with every tile in the emulator: `python -m tests.plugins.ptx [CAPABILITY ...]`.

Takes some minutes a compute capability; the tests run a few. Writes benchmarks/results/emulated.json: per
cell, compute capability and choice of tiles the worst difference to float64 over the steps, relative to
max(1, |value|), or why the emulator stopped it.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import torch
import triton

from tests.plugins.conftest import Steps
from tests.plugins.ptx.driver import EmulatedDriver
from tests.plugins.ptx.program import Fault
from tests.plugins.test_device import CELLS, choices
from tests.plugins.test_ptx import TOLERANCE, Emulated

RESULT = Path(__file__).parents[3] / "benchmarks" / "results" / "emulated.json"
CAPABILITIES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0")
SIZE, STEPS, PIXELS = (1, 5, 13), 4, 300  # 65 pixels: no tile divides them; tiles as if 300 were expected


def main(capabilities: tuple[str, ...]) -> int:
    """How many choices of tiles are wrong."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, float | str]]] = {}
    wrong = 0
    for capability in capabilities:
        for cell, _ in CELLS:
            for tiles in choices(cell, capability, PIXELS):
                driver = EmulatedDriver()
                sys.modules["cuda.bindings.driver"] = driver
                launch = Emulated(capability, driver).launch
                result: float | str
                try:
                    worst = Steps(cell, SIZE, tiles, half_copy=False, launch=launch).run(STEPS)
                    result = float(f"{max(worst.values()):.2e}")
                except Fault as error:
                    result = str(error)
                good = isinstance(result, float) and result <= TOLERANCE[cell.state_dtype]
                wrong += not good
                names = ", ".join(f"{kernel} {tile.label}" for kernel, tile in tiles.items())
                print(f"{'good ' if good else 'WRONG'} {capability:>4}  {cell.label}: {names}: {result}", flush=True)
                found.setdefault(cell.label, {}).setdefault(capability, {})[names] = result
    versions = {"triton": triton.__version__, "torch": torch.__version__, "date": str(datetime.date.today())}
    about = {"size": SIZE, "steps": STEPS, "tolerance": TOLERANCE, "versions": versions}
    RESULT.write_text(json.dumps({**about, "worst": found}, indent=1) + "\n")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(tuple(sys.argv[1:]) or CAPABILITIES), 1))
