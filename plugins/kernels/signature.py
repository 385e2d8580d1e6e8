"""Table of the kernels: source module, parameters in order, the buffer behind each, and constants.

The compiler (dtypes), the launcher (order and offsets) and the tests read this table. A buffer is a piece of
memory of one step: one kernel writes the buffer z and the next one reads it. Packed weights are named after
their kernel, such as "gru_gates.wx".
"""

from __future__ import annotations

from dataclasses import dataclass

from stepcell.ops import CONV_LSTM, OpName, OpVariant
from stepcell.plugins.kernels.cell_config import CellConfig, padded
from stepcell.plugins.kernels.tiles import Tile

__all__ = [
    "PARAMETERS",
    "SOURCES",
    "Parameter",
    "constants",
    "kernel_inputs",
    "kernel_outputs",
    "kernels_of",
    "pointer_dtype",
    "workspace",
]


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter.

    Attributes:
        name: as in the kernel.
        dtype: dtype of the memory pointed to: "float16", "float32", "state" (the cell's state dtype) or "count"
            (int32); "int32" is a number, not a pointer.
        buffer: name of the memory; empty: memory of the launcher; for a number H, W or P.
    """

    name: str
    dtype: str
    buffer: str


def _parameters(kernel: str, text: str) -> tuple[Parameter, ...]:
    dtypes = {"half": "float16", "float": "float32", "state": "state", "count": "count"}
    own = {"wx", "wh", "bias", "peephole"}
    found = []
    for entry in text.split():
        name, kind, *buffer = entry.split(":")
        found.append(Parameter(name, dtypes[kind], f"{kernel}.{name}" if name in own else (buffer or [name])[0]))
    return (*found, *(Parameter(name, "int32", name) for name in "HWP"))


_SPLIT = " partials:float arrivals:count:"  # null unless the tile is split (triton/split.py)

# By kernel: the module of kernels/triton that has it, and its parameters as name:dtype[:buffer].
_KERNELS = {
    "narrow_state": ("narrow", "state:float h_out:half:h"),
    "gru_gates": (
        "gru",
        "x:half h:half pre:half wx:half wh:half bias:float state:state z_out:half:z rh_out:half:rh" + _SPLIT,
    ),
    "gru_candidate": (
        "gru",
        "x:half rh:half pre:half wx:half wh:half bias:float z:half state:state state_out:state y_out:half:y" + _SPLIT,
    ),
    "gru_after": (
        "gru",
        "x:half h:half pre:half wx:half wh:half bias:float state:state state_out:state y_out:half:y" + _SPLIT,
    ),
    "lstm_step": (
        "lstm",
        "x:half h:half pre:half wx:half wh:half bias:float peephole:float cell:state"
        " state_out:state cell_out:state y_out:half:y" + _SPLIT,
    ),
}
SOURCES = {kernel: source for kernel, (source, _) in _KERNELS.items()}
PARAMETERS = {kernel: _parameters(kernel, text) for kernel, (_, text) in _KERNELS.items()}

# The kernels of one step of each variant of an op, in launch order.
_STEPS: dict[tuple[OpName, OpVariant], tuple[str, ...]] = {
    ("ConvGRU", "before"): ("gru_gates", "gru_candidate"),
    ("ConvGRU", "after"): ("gru_after",),
    ("ConvLSTM", "none"): ("lstm_step",),
    ("ConvLSTM", "channel"): ("lstm_step",),
    ("ConvLSTM", "map"): ("lstm_step",),
}


def kernels_of(cell: CellConfig, *, fp16_mirror: bool) -> tuple[str, ...]:
    """The kernels of one step, in launch order.

    Args:
        fp16_mirror: the caller provides the fp16 mirror of a float32 state (y of the last step); otherwise
            narrow_state converts the state first. A float16 state needs no mirror.
    """
    step = _STEPS[cell.op, cell.variant]
    return step if fp16_mirror or cell.state_dtype == "float16" else ("narrow_state", *step)


def kernel_inputs(kernel: str, cell: CellConfig) -> tuple[Parameter, ...]:
    """Pointer parameters that a kernel reads for this cell."""
    unused = {"pre", "partials", "arrivals"} | ({"peephole"} if cell.variant == "none" else set())
    pointers = [each for each in PARAMETERS[kernel] if each.dtype != "int32" and each.name not in unused]
    return tuple(each for each in pointers if not each.name.endswith("_out"))


def kernel_outputs(kernel: str) -> tuple[Parameter, ...]:
    """Pointer parameters that a kernel writes."""
    return tuple(each for each in PARAMETERS[kernel] if each.name.endswith("_out"))


def pointer_dtype(parameter: Parameter, cell: CellConfig) -> str:
    """Dtype that a parameter of a cell's kernel points to; "int32" for a number."""
    return cell.state_dtype if parameter.dtype == "state" else parameter.dtype


def constants(kernel: str, cell: CellConfig, tile: Tile, capability: str = "") -> dict[str, int | bool]:
    """The constexpr arguments of a kernel; the compute capability affects only the number of stages."""
    if kernel == "narrow_state":
        return {"C": cell.hidden, "BM": tile.pixels, "BC": tile.channels}
    values: dict[str, int | bool] = {
        "CX": cell.inputs,
        "C": cell.hidden,
        "KH": cell.kernel[0],
        "KW": cell.kernel[1],
        "HAS_PRE": cell.pre,
        "HARD": cell.gates == "hard",
        "WIDE": cell.state_dtype == "float32",
    }
    if kernel == "lstm_step":
        values["PEEPHOLE"] = CONV_LSTM.variants.index(cell.variant)
    values |= {"BM": tile.pixels, "BC": tile.channels, "BK": tile.depth, "STAGES": tile.stages}
    unsafe = ("9.0", "10.0", "11.0") if kernel == "gru_after" else ("9.0",)  # see triton/conv.py
    values |= {"RAGGED_STAGES": 1 if capability in unsafe else tile.stages, "SPLITS": tile.splits}
    return values | ({"OVERLAP": tile.overlap} if kernel in ("gru_gates", "gru_candidate") else {})


def workspace(cell: CellConfig, pixels: int, *, fp16_mirror: bool) -> dict[str, int]:
    """Bytes of each buffer that lives only within a step, from one kernel to the next.

    Args:
        pixels: batch * height * width.
        fp16_mirror: as in `kernels_of`.
    """
    nbytes = pixels * padded(cell.hidden) * 2
    written = {p.buffer for kernel in kernels_of(cell, fp16_mirror=fp16_mirror) for p in PARAMETERS[kernel]}
    made = {"z", "rh"} | ({"h"} if "narrow_state" in kernels_of(cell, fp16_mirror=fp16_mirror) else set())
    return dict.fromkeys(sorted(made & written), nbytes)
