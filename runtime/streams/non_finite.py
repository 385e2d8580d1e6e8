"""Detection of NaN and Inf in outputs and states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract

__all__ = ["STATES_EVERY", "OnNonFinite", "first_non_finite", "non_finite_rows"]

OnNonFinite = Literal["stop", "reset", "ignore"]
# Outputs are on the host and checked after every step. States are on the device and must be copied to be checked, so
# this is done once per so many frames. docs/run.md has the cost of both.
STATES_EVERY = 100


def first_non_finite(outputs: Mapping[str, NDArray[Any]]) -> str | None:
    """Name of the first array that holds NaN or Inf."""
    floats = ((name, array) for name, array in outputs.items() if array.dtype.kind == "f")
    return next((name for name, array in floats if not np.isfinite(array).all()), None)


def non_finite_rows(contract: StepContract, states: Mapping[str, NDArray[Any]]) -> dict[int, str]:
    """Rows of the batch whose states hold NaN or Inf, each with the name of the first such state."""
    rows: dict[int, str] = {}
    for spec in contract.states:
        finite = np.isfinite(spec.by_stream(states[spec.name]))
        for row in np.flatnonzero(~finite.reshape(len(finite), -1).all(1)):
            rows.setdefault(int(row), spec.name)
    return rows
