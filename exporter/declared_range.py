"""Comparison of the declared range of output pictures with the values that they had in the check."""

from __future__ import annotations

import logging

from stepcell.contract import StepContract
from stepcell.exporter.parity import Seen
from stepcell.pixels import picture_channels, value_range

__all__ = ["warn_of_range"]

logger = logging.getLogger(__name__)

_OUTSIDE = 0.5  # of the range; untrained frames may leave it a little
_FLAT = 0.02  # of the range: 0 to 1 declared as 0 to 255


def warn_of_range(contract: StepContract, seen: Seen) -> None:
    """Log a warning for each output picture whose values and whose declared range do not fit each other.

    Args:
        seen: smallest and largest value of each output over the check.
    """
    for spec in contract.outputs:
        limits = value_range(spec)
        if limits is None or spec.name not in seen or picture_channels(spec) is None or spec.range is None:
            continue
        (low, high), (least, most) = limits, seen[spec.name]
        span = high - low
        if least < low - _OUTSIDE * span or most > high + _OUTSIDE * span or 0 < most - least < _FLAT * span:
            logger.warning(
                f"{spec.name}: declared as {low:g} to {high:g}, and its values over the check are {least:.3g} to "
                f"{most:.3g}: if it is another range, declare it: --range {spec.name}:LOW,HIGH"
            )
