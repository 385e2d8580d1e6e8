"""Check of a fused file against the original one: both in ONNX Runtime, and in float16 as they are written."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from stepcell.contract import Parity, StepContract
from stepcell.errors import ExportError
from stepcell.exporter.arithmetic import AS_WRITTEN, IN_ONNX_RUNTIME, evaluated_step, holds_float16
from stepcell.exporter.from_onnx.probe import Sample
from stepcell.exporter.from_onnx.sizes import Sizes
from stepcell.exporter.liveness import dead_states
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.parity import (
    OWN_RUNS,
    CheckClip,
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
        Worst absolute difference per output and state.

    Raises:
        ParityError: the fused file differs by more than `parity.TOLERANCE` and by more than the
            original in the same precision with its inputs off by their last bit.
        ExportError: the original returns NaN, or a state changes nothing.
    """
    states = contract.states
    inputs = {state.name: str(state.original_input) for state in states}
    outputs = {state.name: str(state.original_output) for state in states}
    before = file_step(original, contract, inputs, outputs)

    steps = STEPS if states else _STATELESS_STEPS

    def clips_at(sample: Sample, make: Callable[..., CheckClip]) -> list[CheckClip]:
        shapes = {spec.name: sample.shapes[spec.name] for spec in contract.inputs}
        shapes |= {state.name: sample.shapes[str(state.original_input)] for state in states}
        return [make(contract, f"sizes {sample.symbols}", shapes, steps, scalars) for scalars in sample.scalars]

    samples = sizes.samples
    clips = [*clips_at(samples[0], random_clip), *clips_at(samples[min(1, len(samples) - 1)], smooth_clip)]

    def compared(reference: Step, other: Step, own: Step, subject: str) -> Parity:
        return check_equal(
            fed_back(reference),
            fed_back(other),
            clips,
            tolerance_of(contract.precision, states),
            own_runs=lambda: [nudged(fed_back(own), contract.precision, run) for run in range(1, OWN_RUNS + 1)],
            subject=subject,
            seen=seen,
        )

    parity = compared(before, file_step(fused, contract), before, "the original file in ONNX Runtime")
    parity = msgspec.structs.replace(parity, arithmetic=IN_ONNX_RUNTIME)
    if holds_float16(contract):
        exact = evaluated_step(original.data, "float64", contract, clips[0], inputs, outputs)
        own = evaluated_step(original.data, "as_written", contract, clips[0], inputs, outputs)
        after = evaluated_step(fused.data, "as_written", contract, clips[0])
        if exact and own and after:
            parity = compared(exact, after, own, "the original file in float64")
            parity = msgspec.structs.replace(parity, arithmetic=AS_WRITTEN)
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
