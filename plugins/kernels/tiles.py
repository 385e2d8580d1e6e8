"""Choice of the tiles that each kernel is compiled with, by kernel, compute capability and map size.

The choice is an estimate: it is based on register counts and on the GPUs' architecture, and no tile has been timed
on a device yet. `make gpu-check` times every tile on the benchmark's shapes (`benchmarks/kernels.py --tune` some
more); correct the choice from its results.

All tiles have four warps: with eight, a convolution loop of this form has been reported to compute wrong results
(pytorch issue 173068), and ours has not been tried on a device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from stepcell.errors import UsageError
from stepcell.plugins.kernels.cell_config import CellConfig, padded

__all__ = ["COLUMNS", "Tile", "partial_bytes", "tiles"]


@dataclass(frozen=True)
class Tile:
    """Work of one program, and its schedule.

    Attributes:
        pixels: rows of the tile (BM).
        channels: hidden channels (BC); a kernel computes all their gates.
        depth: rows of the weight matrix (tap, channel) per step of the K loop (BK).
        stages: loop steps in flight (software pipelining).
        warps: groups of 32 threads.
        splits: programs that share the K loop of a tile (triton/split.py).
        overlap: gru_gates allows gru_candidate to start before it has finished, and gru_candidate does so
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
        """Text form, read by `from_label`: 64x32x32s4w4, or 64x32x32s4w4k4p if split in four and overlapping."""
        word = f"{self.pixels}x{self.channels}x{self.depth}s{self.stages}w{self.warps}"
        return word + (f"k{self.splits}" if self.splits > 1 else "") + "p" * self.overlap

    @classmethod
    def from_label(cls, label: str) -> Tile:
        """Parse a label.

        Raises:
            UsageError: the text is not a label.
        """
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)s(\d+)w(\d+)(?:k(\d+))?(p?)", label, re.ASCII)
        if found is None:
            raise UsageError(
                f"tile: cannot read {label!r}", hint="pixels x channels x depth s stages w warps [k splits] [p]"
            )
        *numbers, overlap = found.groups(default="1")
        pixels, channels, depth, stages, warps, splits = map(int, numbers)
        return cls(pixels, channels, depth, stages, warps, splits, overlap == "p")


# Gates that a kernel computes per channel. A program has channels * COLUMNS columns; these fill the tensor cores
# and take the registers.
COLUMNS = {
    "gru_gates": 2,
    "gru_candidate": 1,
    "gru_after": 4,
    "lstm_step": 4,
}


def partial_bytes(kernel: str, tile: Tile) -> int:
    """Bytes of the partial sums of one program (float32, all its columns); 0: the tile is not split."""
    return 4 * tile.pixels * tile.channels * COLUMNS[kernel] if tile.splits > 1 else 0


_SMALL_MAP = 8192  # fewer pixels: 128-pixel tiles leave most of a large GPU idle
_TINY_MAP = 2048  # fewer pixels: 64-pixel tiles do so too
_SPLITS = 4
_SHARE = 4  # smallest number of loop steps per split


def tiles(kernel: str, cell: CellConfig, capability: str, pixels: int | None = None) -> tuple[Tile, ...]:
    """Tiles to compile a kernel with: the default first, then alternatives for TensorRT to time.

    Args:
        kernel: its name in signature.py.
        cell: what it computes.
        capability: the GPU's compute capability, such as "8.7".
        pixels: expected batch * height * width; None: unknown.
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
        # A (128, 64) tile of a float32 state next to the accumulator spills registers.
        choices = [tile(64, 64, depth, 4), tile(128, 32, depth, 3)]
    else:
        choices = [tile(64, 64, depth, 4), tile(128, 64, 32, 3)]
        if new and not small:
            choices.insert(0, tile(128, 64, depth, 3))
    if small:
        choices.append(tile(64, 32, depth, 4))
    if pixels is not None and pixels < _TINY_MAP and _steps(cell, choices[0].depth) >= _SPLITS * _SHARE:
        # With depth 64, gru_after for 12.0 runs out of registers.
        whole = tile(64, 128, 32, 3) if gates == 4 else choices[0]
        choices.append(replace(whole, splits=_SPLITS))
    if new and kernel == "gru_gates":
        choices = [replace(each, overlap=True) for each in choices]  # free if the candidate does not start early
    if new and kernel == "gru_candidate" and cell.inputs:
        # Only the default tile, whole and split: every further one doubles the tactics that TensorRT times.
        choices += [replace(t, overlap=True) for t in choices if replace(t, splits=1) == choices[0]]
    return tuple(dict.fromkeys(choices))


def _steps(cell: CellConfig, depth: int) -> int:
    """Approximate number of steps of a kernel's K loop."""
    return cell.kernel[0] * cell.kernel[1] * (padded(cell.inputs) + padded(cell.hidden)) // depth


def _power_of_two(channels: int) -> int:
    return 1 << (channels - 1).bit_length()
