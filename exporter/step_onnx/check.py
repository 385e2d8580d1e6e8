"""Check of an exported file against its module in float64: float16 as it is written, float32 in ONNX Runtime."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import torch
from torch import nn

from stepcell.contract import Parity, StepContract
from stepcell.dims import resolve
from stepcell.errors import ExportError
from stepcell.exporter.arithmetic import AS_WRITTEN, IN_ONNX_RUNTIME, evaluated_step, holds_float16
from stepcell.exporter.floats import Floats
from stepcell.exporter.liveness import dead_states
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.parity import (
    OWN_RUNS,
    Arrays,
    CheckClip,
    Model,
    Seen,
    Step,
    check_equal,
    fed_back,
    file_step,
    nudged,
    random_clip,
    smooth_clip,
    tolerance_of,
)
from stepcell.exporter.step_onnx.contract import sizes_for_check
from stepcell.exporter.step_onnx.precision import in_precision

__all__ = ["STEPS", "check_export"]

STEPS = 32
_SHORT = 2  # steps in ONNX Runtime of a file that is evaluated over all of them


def check_export(
    model: nn.Module, data: bytes, contract: StepContract, steps: int = STEPS, *, seen: Seen | None = None
) -> Parity:
    """Compare over random and smooth frames, at two sizes where sizes are dynamic; every state must matter.

    Args:
        model: the module in float32, weights as in the checkpoint.
        data: the file.
        seen: receives the smallest and the largest value of every output and state.

    Returns:
        Worst absolute difference per output and state.

    Raises:
        ParityError: the file differs by more than `parity.TOLERANCE` and by more than the module in
            the file's precision.
        ExportError: ONNX Runtime does not load the file, or a state changes nothing.
    """
    reference = _torch_step(copy.deepcopy(model).double(), contract, wide=True)
    in_onnx_runtime = file_step(OnnxSession(data, "the exported file"), contract)

    def own_runs() -> Sequence[Model]:
        narrow = in_precision(model, contract)
        step = _torch_step(narrow, contract, wide=False)
        return [nudged(fed_back(step), contract.precision, run) for run in range(OWN_RUNS)]

    def compared(step: Step, clips: Sequence[CheckClip]) -> Parity:
        return check_equal(
            fed_back(reference),
            fed_back(step),
            clips,
            tolerance_of(contract.precision, contract.states),
            own_runs=own_runs,
            subject="torch float64",
            hint="try --precision float32; if it passes there, the model needs more than float16 has"
            if contract.precision == "float16"
            else None,
            seen=seen,
        )

    clips = []
    for sizes in sizes_for_check(contract):
        shapes = {spec.name: resolve(spec.shape, sizes) for spec in contract.inputs} | contract.state_shapes(sizes)
        clips += [make(contract, f"sizes {dict(sizes)}", shapes, steps) for make in (random_clip, smooth_clip)]
    as_written = evaluated_step(data, "as_written", contract, clips[0]) if holds_float16(contract) else None
    if as_written is None:
        parity = msgspec.structs.replace(compared(in_onnx_runtime, clips), arithmetic=IN_ONNX_RUNTIME)
    else:
        compared(in_onnx_runtime, [replace(clip, steps=min(steps, _SHORT)) for clip in clips])
        parity = msgspec.structs.replace(compared(as_written, clips), arithmetic=AS_WRITTEN)
    for state in dead_states(in_onnx_runtime, clips, contract.states):
        raise ExportError(
            f"state {state.name}: changes no output and no state at any step of {len(clips)} runs",
            hint="forward must read it; a state that nothing reads is left out of `states`",
        )
    return parity


def _torch_step(model: nn.Module, contract: StepContract, *, wide: bool) -> Step:
    """The module as a step: in float64, or in the contract's dtypes."""
    names = [*(spec.name for spec in contract.outputs), *(state.name for state in contract.states)]

    def step(inputs: Arrays, states: Arrays) -> Arrays:
        arrays = [inputs[spec.name] for spec in contract.inputs] + [states[state.name] for state in contract.states]
        tensors = [torch.from_numpy(array) for array in arrays]
        with torch.no_grad(), Floats(torch.float64) if wide else contextlib.nullcontext():
            results = model(*(t.double() if wide and t.is_floating_point() else t for t in tensors))
        return {name: result.numpy() for name, result in zip(names, results, strict=True)}

    return step
