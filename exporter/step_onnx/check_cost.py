"""How large and how long a comparison may be, by the multiplications of one step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch.utils.flop_counter import FlopCounterMode

from stepcell.contract import StepContract
from stepcell.dims import resolve
from stepcell.exporter.parity import Step, random_clip
from stepcell.exporter.step_onnx.contract import sizes_for_check

__all__ = ["affordable"]

logger = logging.getLogger(__name__)

_FREE = 0.5e9  # of a step at sizes that the check chooses
_FIXED = 2e9  # of a step at sizes that the user fixes
_FEWEST = 8  # steps


def affordable(step: Step, contract: StepContract, steps: int) -> tuple[list[dict[str, int]], int]:
    """The sizes to compare at, smaller for an expensive step, and the steps, fewer where sizes are fixed.

    What is less than usual is logged.

    Args:
        step: the module; one step of it is counted.
        steps: the usual number.
    """
    usual = sizes_for_check(contract)
    cost = _multiplications(step, contract, usual[0])
    free = [symbol for symbol in contract.symbols if symbol != "batch"]
    if free and cost > _FREE:
        sizes = sizes_for_check(contract, scale=(_FREE / cost) ** (1 / len(free)))
        if sizes != usual and (costs := _costs(step, contract, sizes)):
            logger.info(
                f"check:   at {_text(sizes[0], free)} and {_text(sizes[1], free)} in place of {_text(usual[0], free)} "
                f"and {_text(usual[1], free)}, where a step takes {cost / 1e9:.1f} billion multiplications"
            )
            usual, cost = sizes, costs[0]
    fewer = min(steps, max(_FEWEST, int(steps * _FIXED / max(cost, 1))))
    if fewer < steps:
        logger.info(
            f"check:   {fewer} steps in place of {steps}, since each takes {cost / 1e9:.1f} billion multiplications"
        )
    return usual, fewer


def _costs(step: Step, contract: StepContract, sizes: Sequence[Mapping[str, int]]) -> list[float]:
    """Of a step at each of the sizes; empty if one is too small for the module."""
    try:
        return [_multiplications(step, contract, each) for each in sizes]
    except Exception:  # a pyramid that does not fit: the user's code may raise anything
        return []


def _multiplications(step: Step, contract: StepContract, sizes: Mapping[str, int]) -> float:
    shapes = {spec.name: resolve(spec.shape, sizes) for spec in contract.inputs} | contract.state_shapes(sizes)
    clip = random_clip(contract, "", shapes, 1)
    with FlopCounterMode(display=False) as counter:
        step(next(iter(clip)), clip.states)
    return float(counter.get_total_flops()) / 2  # it counts additions as well


def _text(sizes: Mapping[str, int], symbols: list[str]) -> str:
    return "x".join(str(sizes[symbol]) for symbol in symbols)
