"""Cases of benchmarks/kernels.py: cells and sizes, weights, and the work of a step.

A case is one step of the recurrent part of a model: one cell, or several that take the same x and pass the state on
(RAFT's separable ConvGRU: 1x5, then 5x1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from stepcell.models.cells import conv_gru, conv_lstm
from stepcell.plugins.kernels.cell_config import CellConfig

__all__ = ["CASES", "Case", "Problem", "States", "Step", "Weights", "in_turn", "make_problem"]

Weights: TypeAlias = Mapping[str, Tensor]  # of one cell, by the op's names: W_x, b, W_h, W_n, b_hn
States: TypeAlias = tuple[Tensor, ...]  # h, or h and c, (B, C, H, W)
Step: TypeAlias = Callable[[Tensor, States], States]


@dataclass(frozen=True)
class Case:
    """One step: batch, map, and the cells that run in sequence; all of one variant, with states of one size."""

    name: str
    batch: int
    height: int
    width: int
    cells: tuple[CellConfig, ...]

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    @property
    def state_count(self) -> int:
        return 1 if self.cells[0].op == "ConvGRU" else 2

    @property
    def flops(self) -> int:
        """Floating-point operations of the convolutions."""
        return 2 * self.pixels * sum(map(_weight_count, self.cells))

    @property
    def nbytes(self) -> int:
        """Bytes of x, the states in and out, and the weights, each moved once, in float16."""
        first = self.cells[0]
        channels = first.inputs + 2 * self.state_count * first.hidden
        return 2 * (self.pixels * channels + sum(map(_weight_count, self.cells)))

    def floor(self, bytes_per_second: float, flop_per_second: float) -> dict[str, float]:
        """Lower bounds of a step in microseconds: arithmetic, memory, and the larger of the two."""
        compute, memory = self.flops / flop_per_second * 1e6, self.nbytes / bytes_per_second * 1e6
        return {"compute": compute, "memory": memory, "floor": max(compute, memory)}


def _weight_count(cell: CellConfig) -> int:
    return cell.kernel[0] * cell.kernel[1] * (cell.inputs + cell.hidden) * cell.gate_count * cell.hidden


def _case(name: str, batch: int, height: int, width: int, *labels: str) -> Case:
    return Case(name, batch, height, width, tuple(CellConfig.from_label(f"{label}_soft_float16") for label in labels))


CASES = [
    _case("S1 small", 1, 64, 64, "gru_x32_h64_k3x3"),
    _case("S2 medium", 1, 128, 128, "gru_x64_h64_k3x3"),
    _case("S3 RAFT", 1, 55, 128, "gru_x128_h128_k1x5", "gru_x128_h128_k5x1"),
    _case("S4 four streams", 4, 128, 128, "gru_x64_h64_k3x3"),
    _case("S5 matting", 1, 540, 960, "gru_x16_h16_k3x3"),
    _case("S6 events", 1, 20, 15, "gru_x256_h256_k3x3"),
    _case("S1 reset after", 1, 64, 64, "gru-after_x32_h64_k3x3"),
    _case("S2 reset after", 1, 128, 128, "gru-after_x64_h64_k3x3"),
    _case("S1 LSTM", 1, 64, 64, "lstm_x32_h64_k3x3"),
    _case("S2 LSTM", 1, 128, 128, "lstm_x64_h64_k3x3"),
    _case("S6 LSTM", 1, 20, 15, "lstm_x256_h256_k3x3"),
]


@dataclass(frozen=True)
class Problem:
    """A case with its tensors on one device.

    Attributes:
        weights: weights of each cell, float16.
        xs: four inputs, float16, channels-last memory; the steps of a chain use them in turn.
        states: before the step, float16, channels-last memory.
        exact: states after a step with the first input, float64.
    """

    case: Case
    weights: tuple[Weights, ...]
    xs: tuple[Tensor, ...]
    states: States
    exact: States

    @property
    def device(self) -> torch.device:
        return self.xs[0].device


def make_problem(case: Case, device: str) -> Problem:
    """Random weights that saturate no gate, inputs and states; the same in every run."""
    generator = torch.Generator().manual_seed(0)
    weights = tuple(_random_weights(cell, generator, device) for cell in case.cells)
    first, size = case.cells[0], (case.height, case.width)

    def half_map(channels: int) -> Tensor:
        values = torch.randn(case.batch, channels, *size, generator=generator).half().to(device)
        return values.contiguous(memory_format=torch.channels_last)

    xs = tuple(half_map(first.inputs) for _ in range(4))
    states = tuple(half_map(first.hidden).clamp(-1, 1) for _ in range(case.state_count))
    exact = tuple(state.double() for state in states)
    for cell, own in zip(case.cells, weights, strict=True):
        exact = _reference(cell, {name: tensor.double() for name, tensor in own.items()}, xs[0].double(), exact)
    return Problem(case, weights, xs, states, exact)


def in_turn(steps: list[Step]) -> Step:
    """Combine the steps of a case's cells."""

    def step(x: Tensor, states: States) -> States:
        for each in steps:
            states = each(x, states)
        return states

    return step


def _random_weights(cell: CellConfig, generator: torch.Generator, device: str) -> dict[str, Tensor]:
    C, gates = cell.hidden, cell.gate_count
    scale = ((cell.inputs + C) * cell.kernel[0] * cell.kernel[1]) ** -0.5

    def draw(*shape: int, scale: float = scale) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).half().to(device)

    weights = {"W_x": draw(gates * C, cell.inputs, *cell.kernel), "b": draw(gates * C, scale=0.1)}
    weights["W_h"] = draw((2 if cell.op == "ConvGRU" else 4) * C, C, *cell.kernel)
    if cell.op == "ConvGRU":
        weights["W_n"] = draw(C, C, *cell.kernel)
    if cell.variant == "after":
        weights["b_hn"] = draw(C, scale=0.1)
    return weights


def _reference(cell: CellConfig, w: Weights, x: Tensor, states: States) -> States:
    if cell.op == "ConvGRU":
        return (conv_gru(x, states[0], w["W_x"], w["b"], w["W_h"], w["W_n"], w.get("b_hn")),)
    h, c = states
    return conv_lstm(x, h, c, w["W_x"], w["b"], w["W_h"])
