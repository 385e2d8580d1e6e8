"""How two results are compared: floats by value, integers and booleans by the share that differs."""

from __future__ import annotations

import numpy as np
import pytest

from stepcell.errors import ExportError, ParityError
from stepcell.exporter.differences import difference

ZEROS = np.zeros((100, 100))


def test_floats_differ_by_value_relative_to_the_largest() -> None:
    found = difference("y", ZEROS + 10, ZEROS + 10.0005, 1e-4, "the original", 3)
    assert (found.measure, found.differing) == ("values", None)
    assert found.error == pytest.approx(5e-4)
    assert found.limit == pytest.approx(1e-3)
    assert not found.is_beyond
    assert difference("y", ZEROS, ZEROS + np.nan, 1e-4, "the original", 0).is_beyond
    with pytest.raises(ExportError, match="returns NaN at step 2"):
        difference("y", ZEROS + np.nan, ZEROS, 1e-4, "the original", 2)
    with pytest.raises(ParityError, match="has shape"):
        difference("y", ZEROS, ZEROS[:3], 1e-4, "the original", 0)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16"])
def test_one_level_of_a_byte_is_rounding_and_two_are_not(dtype: str) -> None:
    truth = np.full((100, 100), 100, dtype)
    one = difference("y", truth, truth + 1, 1e-4, "the original", 0)
    assert not one.is_beyond
    assert (one.largest, one.differing) == (1, 1.0)
    two = truth.copy()
    two.flat[:2] += 2
    found = difference("y", truth, two, 1e-4, "the original", 0)
    assert found.is_beyond
    assert found.said == "in 0.02% of its elements by more than 1, the limit is 0.01%,"
    wrapped = difference("y", np.full(10, 255, np.uint8), np.full(10, 0, np.uint8), 1e-4, "the original", 0)
    assert wrapped.largest == 255
    assert wrapped.is_beyond


@pytest.mark.parametrize("dtype", ["int64", "int32", "bool"])
def test_of_labels_and_masks_a_share_may_differ(dtype: str) -> None:
    truth = ZEROS.astype(dtype)
    other = truth.copy()
    other.flat[0] = 1
    assert not difference("y", truth, other, 1e-9, "the original", 0).is_beyond  # one of 10,000 lies on the edge
    other.flat[:100] = 1
    assert difference("y", truth, other, 1e-4, "the original", 0).is_beyond
    assert not difference("y", truth, other, 2e-2, "the original", 0).is_beyond
    assert difference("y", truth, other, 1e-4, "the original", 0).said.startswith("in 1.00% of its elements, the")
