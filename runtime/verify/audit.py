"""Precision audit of a finished engine: the dtypes its layers really read and write, against the contract.

A strongly typed network fixes the dtypes of tensors; what the builder makes of it is only in the engine. What TensorRT
lists is what a layer reads, its weights, and what it writes. The dtype a convolution accumulates in is not listed; the
two scalars by which it scales its sum are, and are float32 where the sum is.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stepcell.contract import StepContract
from stepcell.runtime.engine.layers import EngineLayer, LayerTensor
from stepcell.runtime.verify.results import Verdict, unchecked

__all__ = ["Audit", "audit_layers", "precision_verdict"]

# Names of kinds, of TensorRT-RTX's compiler and of Enterprise TensorRT.
_HEAVY = ("correlation", "conv", "deconv", "gemm", "matmul", "matrixmultiply", "matrix_multiply", "runtime_fusion")
_MOVES = ("reformat", "noop", "copy", "shuffle")
_PURE = ("Tran", "Move", "Slic", "Resh", "Cast", "Copy")  # parts of the names of generated kernels that compute nothing
_WIDTH = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "float8": 1, "int8": 1}


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """What the layers of an engine compute in.

    Attributes:
        heavy: number of convolutions and matrix products by the dtype of what they read.
        narrow_sums: those whose sum is scaled by something narrower than float32.
        strange: those that read or hold weights in another dtype than the contract's precision.
        states: dtype of every state input and output as the engine has them.
        narrow_states: states whose new value is made by a layer that reads the old one narrower than it is stored.
        moves: layers that only cast, reorder or copy.
        layers: all of them.
    """

    heavy: dict[str, int]
    narrow_sums: tuple[str, ...]
    strange: tuple[str, ...]
    states: dict[str, str]
    narrow_states: tuple[str, ...]
    moves: tuple[str, ...]
    layers: int


def audit_layers(layers: Sequence[EngineLayer], contract: StepContract) -> Audit:
    """Sort the layers of an engine."""
    heavy: dict[str, int] = {}
    narrow_sums, strange, moves = [], [], []
    for layer in layers:
        if _is_heavy(layer):
            read = _dtypes(layer.inputs) or {"unknown"}
            for dtype in read:
                heavy[dtype] = heavy.get(dtype, 0) + 1
            weights = _dtypes([tensor for tensor in layer.constants if len(tensor.shape) > 1])
            if (read | weights) - {contract.precision}:
                strange.append(layer.name)
            scalars = _dtypes([tensor for tensor in layer.constants if tensor.shape == (1,)])
            if any(_WIDTH.get(dtype, 4) < 4 for dtype in scalars):
                narrow_sums.append(layer.name)
        elif _is_move(layer):
            moves.append(layer.name)
    states: dict[str, str] = {}
    narrow_states = []
    for state in contract.states:
        ends = {state.input: "inputs", state.output: "outputs"}
        for name, side in ends.items():
            found = [tensor.dtype for layer in layers for tensor in getattr(layer, side) if tensor.name == name]
            if found:
                states[name] = found[0]
        writers = [layer for layer in layers if any(tensor.name == state.output for tensor in layer.outputs)]
        given = {tensor.name for layer in writers for tensor in layer.inputs}
        wide = _WIDTH.get(state.dtype, 4)
        reads = [_WIDTH.get(tensor.dtype, 4) for layer in writers for tensor in layer.inputs]
        if writers and state.input not in given and max(reads, default=0) < wide:
            narrow_states.append(state.name)
    return Audit(
        heavy=heavy,
        narrow_sums=tuple(narrow_sums),
        strange=tuple(strange),
        states=states,
        narrow_states=tuple(narrow_states),
        moves=tuple(moves),
        layers=len(layers),
    )


def precision_verdict(layers: Sequence[EngineLayer], contract: StepContract) -> Verdict:
    """Whether the engine computes in the contract's precision and keeps its states in their dtype.

    The number is how many layers or states do not.
    """
    if not layers:
        return unchecked("precision", "there is no list of layers: the engine was built without detailed information")
    audit = audit_layers(layers, contract)
    stored = {state.input: state.dtype for state in contract.states} | {
        state.output: state.dtype for state in contract.states
    }
    wrong_states = [f"{name} is {dtype}" for name, dtype in audit.states.items() if dtype != stored[name]]
    faults = [
        *(f"{name} computes in another dtype than {contract.precision}" for name in audit.strange),
        *(f"{name} sums in less than float32" for name in audit.narrow_sums),
        *wrong_states,
        *(f"the update of {name} is computed narrower than it is stored" for name in audit.narrow_states),
    ]
    total = sum(audit.heavy.values())
    right = audit.heavy.get(contract.precision, 0)
    kinds = ", ".join(sorted({state.dtype for state in contract.states})) or "none"
    summary = (
        f"{right} of {total} convolutions and matrix products read {contract.precision}, states {kinds}, "
        f"{len(audit.moves)} of {audit.layers} kernels only move or cast"
    )
    return Verdict(
        name="precision",
        passed=not faults,
        value=float(len(faults)),
        limit=0.0,
        says=f"{'; '.join(faults)}; {summary}" if faults else summary,
        subjects=(*audit.strange, *audit.narrow_sums, *audit.narrow_states),
    )


def _is_heavy(layer: EngineLayer) -> bool:
    kind = layer.kind.lower()
    return any(kind.startswith(name) for name in _HEAVY)


def _is_move(layer: EngineLayer) -> bool:
    if any(name in layer.kind.lower() for name in _MOVES):
        return True
    stem = layer.name.removeprefix("__myl_").partition("_")[0]
    parts = [stem[at : at + 4] for at in range(0, len(stem), 4)]
    return layer.name.startswith("__myl_") and bool(parts) and all(part in _PURE for part in parts)


def _dtypes(tensors: Sequence[LayerTensor]) -> set[str]:
    return {tensor.dtype for tensor in tensors if tensor.dtype in _WIDTH}
