"""Write the small cases of tests/data/golden: the first steps of a recorded case, under 100 kB.

    python -m tests.golden.keep                       all families, from the recorded cases
    python -m tests.golden.keep golden/my_family/case one case, to be kept for its family

A kept case has the inputs, the initial states and the outputs of its steps, computed in float64 and
stored in float32. Final states belong to the whole run and are left out. A case that is still too large
with three steps is cut to two steps of its first stream.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stepcell.exporter.from_checkpoint.families.registry import PUBLISHED
from tests.golden.cases import KEPT, RECORDED, Case, find_cases

CUTS = ((3, None), (2, 1))  # steps, streams
LIMIT = 100_000


def keep(case: Case, steps: int, streams: int | None) -> int:
    """Write the first steps of the first streams (of all by default); returns the size in bytes."""
    target = KEPT / case.family / case.path.name
    target.mkdir(parents=True, exist_ok=True)
    meta = {key: case.meta[key] for key in ("schema", "system", "case", "upstream", "constructor", "run_options")}
    events = [event for event in case.meta["events"] if event["before_step"] < steps]
    meta |= {"system": case.family, "events": [{**event, "mask": event["mask"][:streams]} for event in events]}
    # Storing float64 outputs in float32 changes them by at most half a unit in the last place.
    meta |= {"suggested_atol_float32": case.tolerance, "arrays": {}}
    arrays = {}
    for name, entry in case.meta["arrays"].items():
        output = entry["role"].startswith("output") and not name.endswith("_f64")
        if output or entry["role"] in ("input", "initial state"):
            wide = case.arrays.get(name + "_f64") if output else None  # it may only hold the last steps
            source = name + "_f64" if wide is not None and list(wide.shape) == entry["shape"] else name
            array, layout = case.arrays[source], entry["layout"]
            if "T" in layout:
                array = np.take(array, range(min(steps, array.shape[layout.index("T")])), layout.index("T"))
            if "B" in layout and streams is not None:
                array = np.take(array, range(streams), layout.index("B"))
            arrays[name] = array.astype(np.float32) if array.dtype == np.float64 else array
            meta["arrays"][name] = {**entry, "shape": list(array.shape)}
    np.savez_compressed(target / "io.npz", **arrays)
    (target / "case.json").write_text(json.dumps(meta, indent=1) + "\n")
    shutil.copyfile(case.path / "checkpoint.pth", target / "checkpoint.pth")
    return sum(path.stat().st_size for path in target.iterdir())


def keep_smallest(cases: Sequence[Case]) -> None:
    """Keep the smallest of these cases that fits the limit."""
    sizes = sorted((sum(f.stat().st_size for f in case.path.iterdir()), case.name, case) for case in cases)
    for (_, name, case), (steps, streams) in itertools.product(sizes, CUTS):
        size = keep(case, steps, streams)
        print(f"{name}: {size} bytes{'' if size < LIMIT else ', too large'}")
        if size < LIMIT:
            return
        shutil.rmtree(KEPT / name)


def main(paths: Sequence[str]) -> None:
    """Keep the given cases, or one of every family."""
    groups = [[Case(Path(path).resolve())] for path in paths]
    for cases in groups or [find_cases(family.name, [RECORDED]) for family in PUBLISHED]:
        keep_smallest(cases)


if __name__ == "__main__":
    main(sys.argv[1:])
