"""Packing of an op's weights into the layout that the kernels read, done once per engine build.

Packed matrix: row k = tap * LD + channel (tap = row of the kernel * width + column, LD = input
channels rounded up to 8), one column per gate channel, columns contiguous:

    gru_gates       z0 r0 z1 r1 ...               2C columns, padded to a multiple of 8
    gru_candidate   n0 n1 ...                      C, padded
    gru_after       z0 r0 z1 r1 ... | n0 n1 ...   2C padded, then C padded
    lstm_step       i0 f0 o0 g0 i1 f1 o1 g1 ...   4C, padded

The gates of a channel are adjacent columns, so one program computes all of them, for any number of
channels and any tile; all tiles read the same packed weights. Padding rows and columns are zero. More
zeros follow the matrix, because a tile may read past the last row and column: loads of weights need no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.ops import OPS
from stepcell.plugins.kernels.cell_config import CellConfig, padded
from stepcell.plugins.kernels.signature import kernels_of

__all__ = ["pack"]

Array = NDArray[Any]

_EXTRA_ROWS = 64  # the deepest tile
_EXTRA_COLUMNS = 1024  # more than the widest tile


def pack(cell: CellConfig, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Pack weights; returns flat arrays by buffer name ("gru_gates.wx"): float16 matrices, float32 biases.

    Args:
        cell: whose weights these are.
        weights: weight inputs of the op by name, of any float dtype, with the shapes of `stepcell.ops`;
            W_x is not needed if cell.inputs is 0.

    Raises:
        InputError: a weight is missing, has another shape, or is not finite in float16.
    """
    for weight in OPS[cell.op].weights_of(cell.variant):
        if weight.kind == "conv_x" and not cell.inputs:
            continue
        name, shape = weight.name, weight.shape(cell.inputs, cell.hidden, cell.kernel, cell.variant)
        if name not in weights:
            raise InputError(f"weights of {cell.label}: {name} is missing, expected shape {shape}")
        found = weights[name].shape
        if len(found) != len(shape) or any(want not in (got, None) for got, want in zip(found, shape, strict=True)):
            raise InputError(f"weights of {cell.label}: {name} must have shape {shape}, got {found}")
        if not np.isfinite(weights[name].astype(np.float16)).all():
            raise InputError(f"weights of {cell.label}: {name} must be finite in float16")
    return _LAYOUTS[kernels_of(cell, fp16_mirror=True)](cell, weights)


def _gru_before(cell: CellConfig, weights: Mapping[str, Array]) -> dict[str, Array]:
    two_c = 2 * cell.hidden
    gates, candidate = _gates_of(cell, weights, slice(0, two_c)), _gates_of(cell, weights, slice(two_c, None))
    return {
        "gru_gates.wx": _matrix(_interleaved(gates, 2)),
        "gru_gates.wh": _matrix(_interleaved(weights["W_h"], 2)),
        "gru_gates.bias": _vector(_interleaved(weights["b"][:two_c], 2)),
        "gru_candidate.wx": _matrix(candidate),
        "gru_candidate.wh": _matrix(weights["W_n"]),
        "gru_candidate.bias": _vector(weights["b"][two_c:]),
    }


def _gru_after(cell: CellConfig, weights: Mapping[str, Array]) -> dict[str, Array]:
    two_c = 2 * cell.hidden
    gates, candidate = _gates_of(cell, weights, slice(0, two_c)), _gates_of(cell, weights, slice(two_c, None))
    bias = weights["b"]
    return {
        "gru_after.wx": _matrix(_interleaved(gates, 2), candidate),
        "gru_after.wh": _matrix(_interleaved(weights["W_h"], 2), weights["W_n"]),
        "gru_after.bias": _vector(_interleaved(bias[:two_c], 2), bias[two_c:], weights["b_hn"]),
    }


def _lstm(cell: CellConfig, weights: Mapping[str, Array]) -> dict[str, Array]:
    packed = {
        "lstm_step.wx": _matrix(_interleaved(_gates_of(cell, weights, slice(None)), 4)),
        "lstm_step.wh": _matrix(_interleaved(weights["W_h"], 4)),
        "lstm_step.bias": _vector(_interleaved(weights["b"], 4)),
    }
    if cell.variant != "none":
        packed["lstm_step.peephole"] = np.ascontiguousarray(weights["w_c"], np.float32).reshape(-1)
    return packed


# By the kernels of a step.
_LAYOUTS: dict[tuple[str, ...], Callable[[CellConfig, Mapping[str, Array]], dict[str, Array]]] = {
    ("gru_gates", "gru_candidate"): _gru_before,
    ("gru_after",): _gru_after,
    ("lstm_step",): _lstm,
}


def _gates_of(cell: CellConfig, weights: Mapping[str, Array], rows: slice) -> Array:
    """Some gates of W_x; of size 0 along the input channels for a cell without x."""
    whole = weights["W_x"] if cell.inputs else np.zeros((cell.gate_count * cell.hidden, 0, *cell.kernel), np.float16)
    return whole[rows]


def _interleaved(stacked: Array, gates: int) -> Array:
    """Reorder rows from gate-major to channel-major."""
    return stacked.reshape(gates, len(stacked) // gates, *stacked.shape[1:]).swapaxes(0, 1).reshape(stacked.shape)


def _matrix(*blocks: Array) -> Array:
    """Concatenate weights (N, Cin, kh, kw), each padded to 8 columns, as a matrix with rows (tap, channel)."""
    columns = [np.pad(block, ((0, -len(block) % 8), (0, -block.shape[1] % 8), (0, 0), (0, 0))) for block in blocks]
    joined = np.concatenate(columns).transpose(2, 3, 1, 0).astype(np.float16)
    width = joined.shape[-1]
    return np.concatenate([joined.reshape(-1), np.zeros(_EXTRA_ROWS * width + _EXTRA_COLUMNS, np.float16)])


def _vector(*blocks: Array) -> Array:
    padded_blocks = [np.pad(block.astype(np.float32), (0, padded(len(block)) - len(block))) for block in blocks]
    return np.concatenate([*padded_blocks, np.zeros(_EXTRA_COLUMNS, np.float32)])
