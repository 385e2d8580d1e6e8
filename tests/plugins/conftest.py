"""Fixtures that step a cell in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from stepcell.plugins.kernels.cell_config import CellConfig, padded
from stepcell.plugins.kernels.signature import PARAMETERS, constants, pointer_dtype
from stepcell.plugins.kernels.tiles import Tile
from tests.fakes.interpreted_kernels import interpreted_source
from tests.fakes.interpreted_kernels import launch as run_interpreted
from tools.kernel_steps import Launch, Steps, split_memory

with triton.knobs.runtime.scope():
    triton.knobs.runtime.interpret = True
    epilogue = interpreted_source("epilogue")

    @triton.jit
    def activations(x: Any, out: Any, HARD: tl.constexpr) -> None:
        lane = tl.arange(0, 8)
        tl.store(out + lane, epilogue.sigmoid(tl.load(x + lane), HARD))
        tl.store(out + 8 + lane, epilogue.tanh(tl.load(x + lane), HARD))


def interpret(
    kernel: str, cell: CellConfig, tile: Tile, buffers: Mapping[str, torch.Tensor], size: tuple[int, int, int]
) -> None:
    """Run one kernel in Triton's interpreter."""
    batch, height, width = size
    numbers = {"H": height, "W": width, "P": batch * height * width}
    splits = 1 if kernel == "narrow_state" else tile.splits
    grid = (-(-numbers["P"] // tile.pixels), -(-padded(cell.hidden) // tile.channels), splits)
    unused = torch.zeros(8, dtype=torch.float16)
    own, given = split_memory(kernel, tile, grid) if splits > 1 else None, dict(buffers)
    if own is not None:
        given["partials"], given[""] = own[0].values, own[1].values
    arguments = [numbers[p.name] if p.dtype == "int32" else given.get(p.buffer, unused) for p in PARAMETERS[kernel]]
    for p, argument in zip(PARAMETERS[kernel], arguments, strict=True):
        if isinstance(argument, torch.Tensor) and p.buffer in buffers:
            assert str(argument.dtype) == f"torch.{pointer_dtype(p, cell)}", (p.name, argument.dtype)
    # The interpreter knows no programs that overlap.
    run_interpreted(kernel, grid, arguments, constants(kernel, cell, replace(tile, overlap=False)))
    if own is not None:
        own[0].check(f"{kernel} partials")
        own[1].check(f"{kernel} arrivals")
        assert not own[1].values.any(), f"{kernel}: a launch must leave its counters at zero, got {own[1].values}"


@dataclass
class InterpretedSteps(Steps):
    """Steps whose kernels run in Triton's interpreter unless told otherwise."""

    launch: Launch = interpret


@pytest.fixture
def steps() -> type[InterpretedSteps]:
    return InterpretedSteps


@pytest.fixture
def apply_activations() -> Any:
    """(x, out, HARD=...): sigmoid and tanh of eight values into sixteen."""
    return activations[(1,)]
