"""Check of a fused file against the original one: both in ONNX Runtime, and in float16 as they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from stepcell.contract import Parity, StepContract
from stepcell.errors import ExportError
from stepcell.exporter.arithmetic import AS_WRITTEN, IN_ONNX_RUNTIME, EvaluatedFile, evaluated_step, holds_float16
from stepcell.exporter.from_onnx.probe import Sample
from stepcell.exporter.from_onnx.sizes import Sizes
from stepcell.exporter.liveness import dead_states
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.parity import CheckClip, Seen, Step, file_step, noting, random_clip, smooth_clip
from stepcell.exporter.rounding import CheckedFile, check_rounding, compare

__all__ = ["STEPS", "check_fused"]

STEPS = 100
_STATELESS_STEPS = 10  # nothing adds up


def check_fused(
    original: OnnxSession, fused: OnnxSession, contract: StepContract, sizes: Sizes, seen: Seen | None = None
) -> Parity:
    """Compare over random frames and over smooth ones, at two sizes where the file has more than one.

    Args:
        seen: receives the smallest and the largest value of every output and state.

    Returns:
        Errors and their bound, per output and state.

    Raises:
        ParityError: the fused file computes something else than the original, or is beyond its bound.
        ExportError: the original returns NaN, or a state changes nothing.
    """
    states = contract.states
    inputs = {state.name: str(state.original_input) for state in states}
    outputs = {state.name: str(state.original_output) for state in states}
    before = noting(file_step(original, contract, inputs, outputs), seen)

    steps = STEPS if states else _STATELESS_STEPS

    def clips_at(sample: Sample, make: Callable[..., CheckClip]) -> list[CheckClip]:
        shapes = {spec.name: sample.shapes[spec.name] for spec in contract.inputs}
        shapes |= {state.name: sample.shapes[str(state.original_input)] for state in states}
        return [make(contract, f"sizes {sample.symbols}", shapes, steps, scalars) for scalars in sample.scalars]

    samples = sizes.samples
    clips = [*clips_at(samples[0], random_clip), *clips_at(samples[min(1, len(samples) - 1)], smooth_clip)]

    def source() -> Step:
        return EvaluatedFile(original.data, "float64", contract, inputs, outputs).step

    file = CheckedFile(
        data=fused.data,
        step=file_step(fused, contract),
        arithmetic=IN_ONNX_RUNTIME,
        contract=contract,
        source=source,
    )
    exact = written = None
    if holds_float16(contract):
        exact = evaluated_step(original.data, "float64", contract, clips[0], inputs, outputs)
        written = evaluated_step(fused.data, "as_written", contract, clips[0])
    if exact is None or written is None:
        parity = check_rounding(before, file, clips, subject="the original file in ONNX Runtime")
    else:
        compare(before, file, clips, subject="the original file in ONNX Runtime")
        file = replace(file, step=written, arithmetic=AS_WRITTEN)
        parity = check_rounding(exact, file, clips, subject="the original file in float64")
    if sizes.short is not None:
        clips += clips_at(sizes.short, random_clip)
    for state in dead_states(before, clips, states):
        raise ExportError(
            f"{state.original_input}: taken for a state, and changes no output and no state at any step of "
            f"{len(clips)} runs",
            hint="if a flag or a number switches it off, give the value that the model runs with: --value NAME=VALUE; "
            f"only if it is data, new at every step: --state {state.original_input}=",
        )
    return parity
