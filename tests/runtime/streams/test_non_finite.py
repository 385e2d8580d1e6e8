"""Detection of NaN and Inf."""

from __future__ import annotations

import numpy as np

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.runtime.streams.non_finite import first_non_finite, non_finite_rows


def test_outputs_and_rows_of_states() -> None:
    contract = StepContract(
        inputs=(TensorSpec(name="x", shape=("batch",)),),
        outputs=(),
        states=(StateSpec(name="h", shape=("batch", 2)), StateSpec(name="c", shape=(2, "batch"), batch_axis=1)),
    )
    states = {"h": np.zeros((4, 2), np.float16), "c": np.zeros((2, 4), np.float32)}
    assert first_non_finite(states) is None
    assert non_finite_rows(contract, states) == {}
    states["h"][2, 1] = np.inf
    states["c"][0, 3] = np.nan
    states["c"][1, 2] = -np.inf
    assert first_non_finite(states) == "h"
    assert non_finite_rows(contract, states) == {2: "h", 3: "c"}
    assert first_non_finite({"labels": np.zeros(3, np.int64)}) is None
