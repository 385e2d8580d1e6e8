"""Which tile a kernel is compiled with, per GPU and shape.

THIS TABLE IS A PLAN. It follows what compiles without spills and how the GPUs are built; no tile has
been timed on a device yet. `make gpu-check` times every tile on the benchmark's shapes (and with
`benchmarks/kernels.py --tune` others too), and this table is to be corrected from what it writes.

Four warps everywhere: with eight, a convolution loop of this very form has been reported to compute
wrong results on a device (pytorch issue 173068), and no device has shown yet that ours does not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from stepcell.errors import UsageError
from stepcell.plugins.kernels.cell_config import CellConfig, padded

__all__ = ["COLUMNS", "Tile", "partial_bytes", "tiles"]


@dataclass(frozen=True)
class Tile:
    """The work of one program and how it is scheduled.

    Attributes:
        pixels: rows of the tile (BM).
        channels: hidden channels (BC); a kernel computes every gate of them.
        depth: values of tap and channel per step of the loop (BK).
        stages: steps that are in flight at a time.
        warps: groups of 32 threads.
        splits: programs that share the loop of a tile (split.py).
        overlap: gru_gates lets gru_candidate start before it is done, and gru_candidate does so
            (programmatic dependent launch; compute capability 9.0 and later).
    """

    pixels: int
    channels: int
    depth: int
    stages: int
    warps: int = 4
    splits: int = 1
    overlap: bool = False

    @property
    def label(self) -> str:
        """The tile in one word that `from_label` reads: 64x32x32s4w4; split in four and overlapping 64x32x32s4w4k4p."""
        word = f"{self.pixels}x{self.channels}x{self.depth}s{self.stages}w{self.warps}"
        return word + (f"k{self.splits}" if self.splits > 1 else "") + "p" * self.overlap

    @classmethod
    def from_label(cls, label: str) -> Tile:
        """The tile of a label.

        Raises:
            UsageError: it is no label.
        """
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)s(\d+)w(\d+)(?:k(\d+))?(p?)", label, re.ASCII)
        if found is None:
            raise UsageError(
                f"tile: cannot read {label!r}", hint="pixels x channels x depth s stages w warps [k splits] [p]"
            )
        *numbers, overlap = found.groups(default="1")
        pixels, channels, depth, stages, warps, splits = map(int, numbers)
        return cls(pixels, channels, depth, stages, warps, splits, overlap == "p")


# Gates that a kernel computes. A program's columns are its channels times these, and it is the columns
# that fill a tensor core and cost registers.
COLUMNS = {
    "gru_gates": 2,
    "gru_candidate": 1,
    "gru_after": 4,
    "lstm_step": 4,
}


def partial_bytes(kernel: str, tile: Tile) -> int:
    """Bytes of the partial sums of one program: float32, all of its columns; 0: the tile is not split."""
    return 4 * tile.pixels * tile.channels * COLUMNS[kernel] if tile.splits > 1 else 0


_SMALL_MAP = 8192  # pixels below which 128-pixel tiles leave most of a large GPU idle
_TINY_MAP = 2048  # pixels below which 64-pixel tiles do so too
_SPLITS = 4
_SHARE = 4  # steps of the loop that are worth a split


def tiles(kernel: str, cell: CellConfig, capability: str, pixels: int | None = None) -> tuple[Tile, ...]:
    """Tiles to compile a kernel with: the default first, then others for TensorRT to time.

    Args:
        kernel: its name in signature.py.
        cell: what it computes.
        capability: the GPU's compute capability, such as "8.7".
        pixels: batch * height * width it will mostly see; None: unknown.
    """
    if kernel == "narrow_state":
        return (Tile(64, min(32, _power_of_two(cell.hidden)), 16, 1),)
    gates = COLUMNS[kernel]
    shortest = min(padded(cell.inputs) or padded(cell.hidden), padded(cell.hidden))
    depth = 64 if shortest >= 64 else 32
    new = int(capability.split(".")[0]) >= 9
    small = pixels is not None and pixels < _SMALL_MAP

    def tile(rows: int, columns: int, deep: int, stages: int) -> Tile:
        channels = min(max(columns // gates, 16), max(16, _power_of_two(cell.hidden)))
        return Tile(rows, channels, deep, stages)

    if gates == 4:
        choices = [tile(64, 128, depth if new else 32, 3), tile(128, 64, 32, 3)]
    elif kernel == "gru_candidate" and cell.state_dtype == "float32":
        # A (128, 64) tile of a float32 state beside that of the accumulator spills registers.
        choices = [tile(64, 64, depth, 4), tile(128, 32, depth, 3)]
    else:
        choices = [tile(64, 64, depth, 4), tile(128, 64, 32, 3)]
        if new and not small:
            choices.insert(0, tile(128, 64, depth, 3))
    if small:
        choices.append(tile(64, 32, depth, 4))
    if pixels is not None and pixels < _TINY_MAP and _steps(cell, choices[0].depth) >= _SPLITS * _SHARE:
        # With depth 64, gru_after of 12.0 has no registers left for the sums.
        whole = tile(64, 128, 32, 3) if gates == 4 else choices[0]
        choices.append(replace(whole, splits=_SPLITS))
    if new and kernel == "gru_gates":
        choices = [replace(each, overlap=True) for each in choices]  # costs nothing where no one starts early
    if new and kernel == "gru_candidate" and cell.inputs:
        # The default, whole and split; others would double what TensorRT has to time.
        choices += [replace(t, overlap=True) for t in choices if replace(t, splits=1) == choices[0]]
    return tuple(dict.fromkeys(choices))


def _steps(cell: CellConfig, depth: int) -> int:
    """Of a kernel's loop, about."""
    return cell.kernel[0] * cell.kernel[1] * (padded(cell.inputs) + padded(cell.hidden)) // depth


def _power_of_two(channels: int) -> int:
    return 1 << (channels - 1).bit_length()
