"""Check of a fused file against the original one, both in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

from stepcell.contract import Parity, StepContract
from stepcell.errors import ExportError
from stepcell.exporter.from_onnx.probe import Sample
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.parity import (
    OWN_RUNS,
    Clip,
    check_equal,
    dead_states,
    fed_back,
    file_step,
    nudged,
    random_clip,
    smooth_clip,
    tolerance_of,
)

__all__ = ["STEPS", "check_fused"]

STEPS = 100


def check_fused(original: OnnxSession, fused: OnnxSession, contract: StepContract, samples: Sequence[Sample]) -> Parity:
    """Compare over random frames and over smooth ones, at two sizes where the file has more than one.

    Returns:
        Worst absolute difference per output and state.

    Raises:
        ParityError: the fused file differs by more than `parity.TOLERANCE` and by more than the
            original with its inputs off by their last bit.
        ExportError: the original returns NaN, or a state changes nothing.
    """
    states = contract.states
    inputs = {state.name: str(state.original_input) for state in states}
    outputs = {state.name: str(state.original_output) for state in states}
    before = file_step(original, contract, inputs, outputs)
    clips: list[Clip] = []
    for sample, make in ((samples[0], random_clip), (samples[min(1, len(samples) - 1)], smooth_clip)):
        shapes = {spec.name: sample.shapes[spec.name] for spec in contract.inputs}
        shapes |= {state.name: sample.shapes[str(state.original_input)] for state in states}
        clips += [make(contract, f"sizes {sample.symbols}", shapes, STEPS, scalars) for scalars in sample.scalars]
    parity = check_equal(
        fed_back(before),
        fed_back(file_step(fused, contract)),
        clips,
        tolerance_of(contract.precision, states),
        own_runs=lambda: [nudged(fed_back(before), contract.precision, run) for run in range(1, OWN_RUNS + 1)],
        subject="the original file in ONNX Runtime",
    )
    for clip in clips:
        for state in dead_states(before, clip, states):
            raise ExportError(
                f"{state.original_input}: taken for a state, and changes no output of the step",
                hint=f"if it is none: --state {state.original_input}=",
            )
    return parity
