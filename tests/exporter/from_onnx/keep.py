"""Make the small cases of tests/data/onnx: a recorded case with the first steps of its run.

python -m tests.exporter.from_onnx.keep
"""

from __future__ import annotations

import json
import shutil

import numpy as np

from tests.exporter.cell_recognition.graphs import run
from tests.exporter.from_onnx.cases import KEPT, RECORDED, Case

# Small, under free licences, and each different: two exporters and two simplifiers, opset 11, lists
# and loops, every weight transformation, and some that must be left alone.
NAMES = (
    "aserdega_gru_dynamo",
    "automan_peephole_dynamo",
    "jk_cell_onnxsim",
    "jk_opset11_ts",
    "mangrick_packed_ts",
    "ndrplz_nobias_dynamo",
    "nm_reflect_pad_ts",
    "nm_update_swapped_ts",
    "openeb_lstm_stride2_separable_slim",
    "raft_stereo_context_ts",
    "rvt_depthwise_xh_ts",
)
KEYS = ("name", "upstream", "exporter", "data_inputs", "data_outputs", "state_pairs", "cells", "tags")
LIMIT = 80_000


def keep(case: Case, steps: int) -> int:
    """Write the small form; returns its size in bytes."""
    target = KEPT / case.name
    target.mkdir(parents=True, exist_ok=True)
    meta = {key: case.meta[key] for key in KEYS}
    arrays = {}
    for name, array in case.arrays.items():
        kind = name.partition("_")[0]
        if name.startswith("ort_final_") or kind == "f64":
            continue
        arrays[name] = array[:steps] if kind in ("in", "ort") else array
    # final states belong to the whole run; the outputs of the kept steps are run again
    last = run(case.model, case.frames[:steps], case.states, case.pairs)[-1]
    arrays |= {f"ort_final_{name}": last[name] for name in case.pairs.values()}
    np.savez_compressed(target / "io.npz", **arrays)
    (target / "case.json").write_text(json.dumps(meta, indent=1) + "\n")
    shutil.copyfile(case.path / "model.onnx", target / "model.onnx")
    return sum(path.stat().st_size for path in target.iterdir())


if __name__ == "__main__":
    for name in NAMES:
        size, steps = next((s, n) for n in (8, 6, 4, 3, 2) if (s := keep(Case(RECORDED / name), n)) < LIMIT)
        print(f"{name}: {steps} steps, {size} bytes")
