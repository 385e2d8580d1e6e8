"""Check of a fused file against the original one, both in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stepcell.contract import Parity, StepContract
from stepcell.errors import ExportError
from stepcell.exporter.from_onnx.probe import Sample
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.parity import (
    OWN_RUNS,
    Arrays,
    Clip,
    Step,
    check_equal,
    dead_states,
    fed_back,
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
    before = _step(original, contract, {s.name: str(s.original_input) for s in states}, _original_outputs(contract))
    after = _step(fused, contract, {s.name: s.input for s in states}, {s.name: s.output for s in states})
    clips: list[Clip] = []
    for sample, make in ((samples[0], random_clip), (samples[min(1, len(samples) - 1)], smooth_clip)):
        shapes = {spec.name: sample.shapes[spec.name] for spec in contract.inputs}
        shapes |= {state.name: sample.shapes[str(state.original_input)] for state in states}
        clips += [make(contract, f"sizes {sample.symbols}", shapes, STEPS, scalars) for scalars in sample.scalars]
    parity = check_equal(
        fed_back(before),
        fed_back(after),
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


def _original_outputs(contract: StepContract) -> dict[str, str]:
    return {state.name: str(state.original_output) for state in contract.states}


def _step(session: OnnxSession, contract: StepContract, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> Step:
    """A file as a step; `inputs` and `outputs` say what it calls the two ends of a state."""

    def step(data: Arrays, states: Arrays) -> Arrays:
        results = session({**data, **{inputs[name]: array for name, array in states.items()}})
        new = {name: results[target] for name, target in outputs.items()}
        return {**{spec.name: results[spec.name] for spec in contract.outputs}, **new}

    return step
