"""Check of the kernels: steps of a cell on guarded, NaN-filled buffers, compared with the float64 reference.

The function that runs a kernel is a parameter: Triton's interpreter, the emulator of PTX or a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stepcell.models.cells import conv_gru, conv_lstm
from stepcell.plugins.kernels.cell_config import CellConfig, padded
from stepcell.plugins.kernels.packing import pack
from stepcell.plugins.kernels.signature import PARAMETERS, kernels_of
from stepcell.plugins.kernels.tiles import COLUMNS, Tile
from stepcell.plugins.kernels.typical import TYPICAL

__all__ = [
    "CELLS",
    "POISON",
    "TOLERANCE",
    "Buffer",
    "Launch",
    "Steps",
    "half_map",
    "random_weights",
    "reference_step",
    "split_memory",
]

# Worst difference to float64 by dtype of the state, relative to max(1, |value|), over all steps
# (tests/plugins/kernels/test_arithmetic.py says why).
TOLERANCE = {"float32": 3e-3, "float16": 2e-2}
_ODD = [  # padding channels, one pixel of overhang, both flavours of the K loop
    "gru_x3_h5_k3x3_soft_float32",
    "gru_x40_h40_k5x5_hard_float32_pre",
    "gru-after_x0_h20_k1x5_soft_float32_pre",
    "gru-after_x3_h70_k3x3_hard_float16",
    "lstm-channel_x12_h36_k7x7_soft_float32",
    "lstm-map_x3_h5_k3x3_soft_float16_pre",
]
# (cell, expected pixels); 300 pixels are few enough that every long loop is split.
CELLS = [*TYPICAL, *((CellConfig.from_label(label), 300) for label in _ODD)]

GUARD = 4096  # values before and after every buffer
POISON = float("nan")

Tensors = dict[str, torch.Tensor]


class Buffer:
    """Memory between two guard regions, filled with NaN (counters: -1) to detect missing and stray writes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        size = int(np.prod(shape))
        poison = POISON if dtype.is_floating_point else -1
        self.memory = torch.full((size + 2 * GUARD,), poison, dtype=dtype, device=device)
        self.values = self.memory[GUARD : GUARD + size].view(shape)

    def check(self, name: str) -> None:
        """Assert that every value was written and no guard was."""
        missing = int(self._poisoned(self.values).sum())
        assert missing == 0, f"{name}: {missing} of {self.values.numel()} values were not written"
        guards = torch.cat([self.memory[:GUARD], self.memory[GUARD + self.values.numel() :]])
        written = int((~self._poisoned(guards)).sum())
        assert written == 0, f"{name}: {written} values written outside"

    def _poisoned(self, values: torch.Tensor) -> torch.Tensor:
        return values.isnan() if values.is_floating_point() else values == -1


def half_map(x: torch.Tensor, padding: float = 0.0) -> torch.Tensor:
    """(B, C, H, W) -> float16 (B, H, W, padded C), with `padding` in the padding channels."""
    batch, channels, height, width = x.shape
    result = x.new_full((batch, height, width, padded(channels)), padding, dtype=torch.float16)
    result[..., :channels] = x.permute(0, 2, 3, 1)
    return result


def from_half_map(x: torch.Tensor, channels: int) -> torch.Tensor:
    return x[..., :channels].permute(0, 3, 1, 2)


def random_weights(cell: CellConfig, size: tuple[int, int], seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random weights of the op, exact in float16, scaled so that no gate saturates."""
    random = np.random.default_rng(seed)
    C, gates = cell.hidden, cell.gate_count
    taps = cell.kernel[0] * cell.kernel[1]

    def draw(*shape: int, scale: float) -> np.ndarray[Any, Any]:
        return (random.standard_normal(shape) * scale).astype(np.float16)

    def conv(rows: int, inputs: int) -> np.ndarray[Any, Any]:
        return draw(rows, inputs, *cell.kernel, scale=1.5 * (taps * inputs) ** -0.5)

    weights = {"b": draw(gates * C, scale=0.5), "W_h": conv((2 if cell.op == "ConvGRU" else 4) * C, C)}
    if cell.inputs:
        weights["W_x"] = conv(gates * C, cell.inputs)
    if cell.op == "ConvGRU":
        weights["W_n"] = conv(C, C)
    if cell.variant == "after":
        weights["b_hn"] = draw(C, scale=0.5)
    if cell.variant == "channel":
        weights["w_c"] = draw(3, C, 1, 1, scale=0.5)
    if cell.variant == "map":
        weights["w_c"] = draw(3, C, *size, scale=0.5)
    return weights


def reference_step(cell: CellConfig, weights: Mapping[str, torch.Tensor], x: torch.Tensor, states: Tensors) -> Tensors:
    """One step of the reference arithmetic in the dtype of `states`; x includes pre-activations, if any, last."""
    w = dict(weights)
    w_x = w.get("W_x", w["b"].new_zeros(len(w["b"]), 0, *cell.kernel))
    x_channels, pre = x[:, : cell.inputs], x[:, cell.inputs :]
    if cell.pre:  # an identity kernel carries the pre-activations into the gates
        identity = x.new_zeros(pre.shape[1], pre.shape[1], *cell.kernel)
        identity[range(pre.shape[1]), range(pre.shape[1]), cell.kernel[0] // 2, cell.kernel[1] // 2] = 1
        w_x, x_channels = torch.cat([w_x, identity], 1), x
    if cell.op == "ConvGRU":
        return {"h": conv_gru(x_channels, states["h"], w_x, w["b"], w["W_h"], w["W_n"], w.get("b_hn"), cell.gates)}
    h, c = conv_lstm(x_channels, states["h"], states["c"], w_x, w["b"], w["W_h"], w.get("w_c"), cell.gates)
    return {"h": h, "c": c}


def split_memory(kernel: str, tile: Tile, grid: tuple[int, int, int]) -> tuple[Buffer, Buffer]:
    """Partial sums filled with NaN, and zeroed counters, both between guards."""
    partials = Buffer((*grid, tile.pixels, COLUMNS[kernel] * tile.channels), torch.float32, "cpu")
    arrivals = Buffer((grid[0], grid[1]), torch.int32, "cpu")
    arrivals.values.zero_()
    return partials, arrivals


Launch = Callable[[str, CellConfig, Tile, Mapping[str, torch.Tensor], tuple[int, int, int]], None]


@dataclass
class Steps:
    """Steps of a cell by its kernels and, in float64, by the reference.

    Attributes:
        size: batch, height, width.
        tile: for every kernel of the step, or one for each.
        launch: runs one kernel on tensors of `device`.
        fp16_mirror: y of the last step is given as the fp16 mirror of the state.
        weights: weights of the op; None: random.
    """

    cell: CellConfig
    size: tuple[int, int, int]
    tile: Tile | Mapping[str, Tile]
    launch: Launch
    fp16_mirror: bool = True
    seed: int = 0
    device: str = "cpu"
    weights: dict[str, np.ndarray[Any, Any]] | None = None
    worst: dict[str, float] = field(default_factory=dict)

    def run(self, steps: int) -> dict[str, float]:
        """Largest difference of every output to float64 over all steps; each side feeds back its own state.

        Relative to max(1, |value|).
        """
        cell, (batch, height, width) = self.cell, self.size
        generator = torch.Generator().manual_seed(self.seed)
        weights = self.weights or random_weights(cell, (height, width), self.seed)
        packed = {k: torch.from_numpy(v).to(self.device) for k, v in pack(cell, weights).items()}
        exact = {k: torch.from_numpy(v).to(self.device, torch.float64) for k, v in weights.items()}
        names = ("h",) if cell.op == "ConvGRU" else ("h", "c")
        shape = (batch, cell.hidden, height, width)
        start = {n: (torch.randn(shape, generator=generator) * 0.5).half().to(self.device) for n in names}
        expected = {name: value.double() for name, value in start.items()}
        wide = cell.state_dtype == "float32"
        state = {n: v.float().contiguous() if wide else half_map(v, padding=POISON) for n, v in start.items()}
        copy = half_map(start["h"], padding=0.0 if wide else POISON)
        for _ in range(steps):
            channels = cell.inputs + (cell.gate_count * cell.hidden if cell.pre else 0)
            x = torch.randn((batch, channels, height, width), generator=generator).half().to(self.device)
            # Padding channels may hold anything, except in the mirror of a float32 state, which kernels write.
            buffers: Tensors = {
                **packed,
                "h": copy,
                "state": state["h"],
                **({"cell": state["c"]} if "c" in state else {}),
            }
            if cell.inputs:
                buffers["x"] = half_map(x[:, : cell.inputs], padding=POISON)
            if cell.pre:
                buffers["pre"] = half_map(x[:, cell.inputs :], padding=POISON)
            written = self._step(buffers)
            expected = reference_step(cell, exact, x.double(), expected)
            state = {"h": written["state_out"]} | ({"c": written["cell_out"]} if "c" in state else {})
            copy = written["y"]
            self._compare(written, expected)
        return self.worst

    def _step(self, buffers: Tensors) -> Tensors:
        """Run the kernels of one step on outputs filled with NaN; returns the outputs."""
        cell, (batch, height, width) = self.cell, self.size
        half_shape = (batch, height, width, padded(cell.hidden))
        state_shape = (batch, cell.hidden, height, width) if cell.state_dtype == "float32" else half_shape
        state_dtype = getattr(torch, cell.state_dtype)
        outputs: dict[str, Buffer] = {}
        for kernel in kernels_of(cell, fp16_mirror=self.fp16_mirror):
            new = {}
            for parameter in PARAMETERS[kernel]:
                if parameter.name.endswith("_out"):
                    is_state = parameter.dtype == "state"
                    shape, dtype = (state_shape, state_dtype) if is_state else (half_shape, torch.float16)
                    new[parameter.buffer] = Buffer(shape, dtype, self.device)
            tile = self.tile if isinstance(self.tile, Tile) else self.tile[kernel]
            self.launch(kernel, cell, tile, {**buffers, **{n: b.values for n, b in new.items()}}, self.size)
            for name, buffer in new.items():
                buffer.check(f"{kernel} {name}")
                if buffer.values.shape == half_shape:
                    assert not buffer.values[..., cell.hidden :].any(), f"{kernel} {name}: padding is not zero"
            outputs |= new
            buffers = {**buffers, **{n: b.values for n, b in new.items()}}
        return {name: buffer.values for name, buffer in outputs.items()}

    def _compare(self, written: Tensors, expected: Tensors) -> None:
        wide = self.cell.state_dtype == "float32"
        pairs = {"y": (written["y"], expected["h"]), "h": (written["state_out"], expected["h"])}
        if "c" in expected:
            pairs["c"] = (written["cell_out"], expected["c"])
        for name, (got, want) in pairs.items():
            got = got if wide and name != "y" else from_half_map(got, self.cell.hidden)
            error = float(((got.double() - want).abs() / want.abs().clamp(min=1)).max())
            self.worst[name] = max(self.worst.get(name, 0.0), error)
