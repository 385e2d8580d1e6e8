"""Identity: the file's graph in float64 against its source in float64 with the same rounded weights.

Both sides compute without significant rounding, so a difference is a mistake: half a bias, gates in another order, a
state shifted by a pixel. What remains is the rounding of weights that the export combines before it stores them, such
as the two biases of a GRU: at most the unit roundoff of the file's precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.verify.clips import Clip
from stepcell.runtime.verify.measure import difference, max_abs
from stepcell.runtime.verify.results import Verdict, judged
from stepcell.runtime.verify.stepper import Stepper, initial_states

__all__ = ["EXACT", "identity"]

EXACT = 1e-9  # of a tensor's largest value: float64 sums in another order, amplified within one step


def identity(file: Stepper, source: Stepper, clip: Clip, states: Mapping[str, NDArray[Any]]) -> Verdict:
    """One step each from the initial states and from warm ones. The number is the largest relative difference."""
    worst, name_of_worst = -1.0, ""
    for frame, start in ((clip[0], initial_states(source.contract, clip[0], float)), (clip[1], states)):
        (outputs, new), (true_outputs, true_new) = file.step(frame, start), source.step(frame, start)
        for got, truth in ((outputs, true_outputs), (new, true_new)):
            for name, expected in truth.items():
                if expected.dtype.kind == "f":
                    off = max_abs(difference(got[name], expected)) / (max_abs(expected) or 1.0)
                else:  # in float64 one element at most lies so close to a decision
                    differing = int((got[name] != expected).sum())
                    off = differing / expected.size if differing > 1 else 0.0
                if not off <= worst and not math.isnan(worst):
                    worst, name_of_worst = off, name
    limit = max(EXACT, float(np.finfo(source.contract.precision).eps) / 2)
    if worst <= EXACT:
        says = f"in float64 the graph equals its source to {worst:.0e}"
    elif worst <= limit:
        says = (
            f"in float64 the graph equals its source to {worst:.0e}, but for the rounding of weights that it combines"
        )
    else:
        says = (
            f"in float64 {name_of_worst} differs from its source by {worst:.1e}: other weights or another computation"
        )
    return judged("identity", worst, limit, says, [name_of_worst])
