"""Check of an exported file against its module in float64: float16 as it is written, float32 in ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from stepcell.contract import Parity, StepContract
from stepcell.dims import resolve
from stepcell.errors import ExportError
from stepcell.exporter.arithmetic import AS_WRITTEN, IN_ONNX_RUNTIME, evaluated_step, holds_float16
from stepcell.exporter.liveness import dead_states
from stepcell.exporter.module_step import module_step
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.parity import Arrays, Seen, Step, file_step, noting, random_clip, smooth_clip
from stepcell.exporter.rounding import CheckedFile, check_rounding, compare
from stepcell.exporter.step_onnx.check_cost import affordable

__all__ = ["STEPS", "check_export"]

STEPS = 32
_SHORT = 2  # steps in ONNX Runtime of a file that is evaluated over all of them
_SUBJECT = "torch float64"


def check_export(
    model: nn.Module, data: bytes, contract: StepContract, steps: int = STEPS, *, seen: Seen | None = None
) -> Parity:
    """Compare over random and smooth frames, at two sizes where sizes are dynamic; every state must matter.

    Where a step is expensive, sizes are smaller and steps fewer (`affordable`).

    Args:
        model: the module in float32, weights as in the checkpoint.
        data: the file.
        seen: receives the smallest and the largest value of every output and state.

    Returns:
        Errors and their bound, per output and state.

    Raises:
        ParityError: the file computes something else than the module, or is beyond its bound.
        ExportError: ONNX Runtime does not load the file, or a state changes nothing.
    """
    in_torch = _torch_step(model, contract)
    chosen, steps = affordable(in_torch, contract, steps)
    clips = []
    for sizes, make in zip(chosen * 2, (random_clip, smooth_clip), strict=False):
        shapes = {spec.name: resolve(spec.shape, sizes) for spec in contract.inputs} | contract.state_shapes(sizes)
        clips.append(make(contract, f"sizes {dict(sizes)}", shapes, steps))
    reference = noting(in_torch, seen)
    in_onnx_runtime = CheckedFile(
        data=data,
        step=file_step(OnnxSession(data, "the exported file"), contract),
        arithmetic=IN_ONNX_RUNTIME,
        contract=contract,
        source=lambda: _torch_step(model, contract, contract.precision),
    )
    hint = (
        "try --precision float32; if it passes there, the model needs more than float16 has"
        if contract.precision == "float16"
        else None
    )
    written = evaluated_step(data, "as_written", contract, clips[0]) if holds_float16(contract) else None
    if written is None:
        parity = check_rounding(reference, in_onnx_runtime, clips, subject=_SUBJECT, hint=hint)
    else:
        short = [replace(clip, steps=min(steps, _SHORT)) for clip in clips]
        compare(reference, in_onnx_runtime, short, subject=_SUBJECT, hint=hint)
        file = replace(in_onnx_runtime, step=written, arithmetic=AS_WRITTEN)
        parity = check_rounding(reference, file, clips, subject=_SUBJECT, hint=hint)
    for state in dead_states(in_onnx_runtime.step, clips, contract.states):
        raise ExportError(
            f"state {state.name}: changes no output and no state at any step of {len(clips)} runs",
            hint="forward must read it; a state that nothing reads is left out of `states`",
        )
    return parity


def _torch_step(model: nn.Module, contract: StepContract, precision: str | None = None) -> Step:
    """The module in float64; `precision`: from weights rounded to it."""
    step = module_step(model, contract, precision=precision)

    def together(inputs: Arrays, states: Arrays) -> Arrays:
        outputs, new = step(inputs, states)
        return {**outputs, **new}

    return together
