"""Recorded references: a run of the reference as a file (.npz), for a box that has neither torch nor onnx.

It holds the clip, what the reference gave at the compared steps and inside the warm window, and what can be said of the
model without it: how it forgets, and what the storage of its states loses. What needs the reference to answer for
states that only the subject reaches, the prediction of the error, cannot be asked then.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.errors import InputError
from stepcell.files import atomic_path
from stepcell.library_errors import library_errors
from stepcell.overwrite import REFERENCE_KEY
from stepcell.runtime.engine.layers import EngineLayer
from stepcell.runtime.loop.snapshot import contract_hash
from stepcell.runtime.verify.bound import Forgetting, bound_verdict, derive_bound, forgetting
from stepcell.runtime.verify.clips import Clip
from stepcell.runtime.verify.growth import error_growth, growth_verdict
from stepcell.runtime.verify.measure import compared_steps, difference, max_abs, rms
from stepcell.runtime.verify.results import Growth, Verdict, WarmError, judged, unchecked
from stepcell.runtime.verify.stepper import Arrays, FunctionStepper, Stepper
from stepcell.runtime.verify.storage import Storage, as_stored, storage_verdict, warm_up
from stepcell.runtime.verify.verification import Findings, Reference, VerifyOptions, own_verdicts

__all__ = ["Record", "RecordedRun", "read_record", "record_reference", "verify_recorded", "write_record"]

_FRAME, _TRUE, _WARM = "frame", "true", "warm"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a recorded reference says beside its arrays.

    Attributes:
        contract_hash: hash of the model it belongs to; see `stepcell.runtime.loop.snapshot`.
        reference: what computed it.
        input: name of the clip.
        frames: frames of the clip.
        steps: steps of the free run.
        compared: steps whose outputs and states are held.
        window: steps of the warm window.
        warm_up: steps before it.
        growth: error of the peer, as `peer_rms`, and scale of each tensor.
        one_step: rms error of the peer's single steps in the window, by state; empty: there is no peer.
        peer: its name.
        storage, forgetting: as found by the reference alone.
    """

    contract_hash: str
    reference: str
    input: str
    frames: int
    steps: int
    compared: tuple[int, ...]
    window: int
    warm_up: int
    growth: tuple[Growth, ...]
    storage: tuple[Storage, ...]
    forgetting: Forgetting | None = None
    peer: str | None = None
    one_step: dict[str, tuple[float, ...]] = {}


class RecordedRun:
    """A recorded reference, read.

    Attributes:
        record: its header.
        clip: what it was run over.
        true: outputs and states after each compared step, by step.
        warm: frames aside, states before each step of the warm window and after the last.
        warm_outputs: outputs of the same steps.
    """

    def __init__(self, record: Record, arrays: Mapping[str, NDArray[Any]], name: str) -> None:
        self.record = record
        self.clip = Clip([_part(arrays, f"{_FRAME}/{t}/") for t in range(record.frames)], record.input)
        self.true = {step: _part(arrays, f"{_TRUE}/{step}/") for step in record.compared}
        self.warm = [_part(arrays, f"{_WARM}/{t}/state/") for t in range(record.window + 1)]
        self.warm_outputs = [_part(arrays, f"{_WARM}/{t}/output/") for t in range(record.window)]
        self.name = name


def record_reference(
    reference: Reference, clip: Clip, options: VerifyOptions
) -> tuple[Record, dict[str, NDArray[Any]]]:
    """Run the reference and keep what `verify_recorded` needs.

    Returns:
        The header and the arrays of the file.
    """
    exact, contract = reference.exact, reference.exact.contract
    compared = compared_steps(options.steps)
    arrays: dict[str, NDArray[Any]] = {}
    for t, frame in enumerate(clip.frames):
        arrays |= {f"{_FRAME}/{t}/{name}": array for name, array in frame.items()}
    run = exact.run()
    for t in range(options.steps):
        outputs, states = run.step(clip[t])
        if t + 1 in compared:
            arrays |= {f"{_TRUE}/{t + 1}/{name}": array for name, array in {**outputs, **states}.items()}
    growth = error_growth(reference.peer or exact, exact, clip, options.steps, reference.peer)
    live = min(options.steps, max(len(clip), options.window))
    warm = warm_up(exact, contract.states, clip, live=live, still=options.still, seconds=options.warm_seconds)
    states, one_step = warm.states, {state.name: [0.0] for state in contract.states}
    for t in range(options.window):
        arrays |= {f"{_WARM}/{t}/state/{name}": array for name, array in states.items()}
        outputs, after = exact.step(clip[t], states)
        arrays |= {f"{_WARM}/{t}/output/{name}": array for name, array in outputs.items()}
        if reference.peer is not None:
            own = reference.peer.step(clip[t], states)[1]
            for name, array in own.items():
                one_step[name].append(rms(difference(array, after[name])))
        states = after
    arrays |= {f"{_WARM}/{options.window}/state/{name}": array for name, array in states.items()}
    forgets = None
    if reference.differentiable:
        forgets = forgetting(exact, clip, warm.states, options.lyapunov)  # type: ignore[arg-type]
    record = Record(
        contract_hash=contract_hash(contract),
        reference=exact.name,
        input=clip.name,
        frames=len(clip),
        steps=options.steps,
        compared=tuple(compared),
        window=options.window,
        warm_up=warm.steps,
        growth=growth,
        storage=warm.storage,
        forgetting=forgets,
        peer=None if reference.peer is None else reference.peer.name,
        one_step={} if reference.peer is None else {name: tuple(found) for name, found in one_step.items()},
    )
    return record, arrays


def write_record(path: Path, record: Record, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a reference; the file is put in place whole or not at all."""
    header = np.frombuffer(msgspec.json.encode(record), np.uint8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **{REFERENCE_KEY: header}, **arrays)  # type: ignore[arg-type]


def verify_recorded(
    subject: Stepper, recorded: RecordedRun, options: VerifyOptions, layers: Sequence[EngineLayer] = ()
) -> Findings:
    """Run the checks that need no live reference."""
    started, record, clip = time.perf_counter(), recorded.record, recorded.clip
    found = Findings(storage=record.storage, warm_up=record.warm_up, forgetting=record.forgetting)
    found.states = recorded.warm[0]
    found.growth = _growth(subject, recorded)
    found.warm, output_errors = _warm(subject, recorded)
    sizes = {name: int(np.size(array)) for name, array in {**recorded.warm_outputs[0], **found.states}.items()}
    if record.forgetting is not None:
        one_step = {each.name: each.one_step for each in found.warm}
        found.bound = derive_bound(record.forgetting, one_step, sizes, output_errors)
    bound = None if found.bound is None else found.bound.rms
    found.verdicts = [
        unchecked("identity", "a recorded reference has no graph to compare with"),
        growth_verdict(found.growth, subject, peer=record.peer, bound=bound, tolerance=options.tolerance),
        _one_step_verdict(found.warm, record),
        storage_verdict(record.storage),
        unchecked("bound", "the reference was recorded without its Jacobian")
        if record.forgetting is None
        else bound_verdict(record.forgetting, found.bound, found.growth),
        *own_verdicts(
            subject,
            _recorded_step(recorded, subject.contract),
            clip,
            found.states,
            as_stored(subject, clip, found.states),
            dataclasses.replace(options, steps=record.steps),
            layers,
        ),
    ]
    found.seconds = time.perf_counter() - started
    return found


def _growth(subject: Stepper, recorded: RecordedRun) -> tuple[Growth, ...]:
    """The free run against the steps that were recorded."""
    record, run = recorded.record, subject.run()
    errors: dict[str, list[tuple[float, float]]] = {each.name: [] for each in record.growth}
    for t in range(record.steps):
        outputs, states = run.step(recorded.clip[t])
        truth = recorded.true.get(t + 1)
        if truth is not None:
            for name, got in {**outputs, **states}.items():
                wrong = difference(got, truth[name])
                errors[name].append((max_abs(wrong), rms(wrong)))
    return tuple(
        msgspec.structs.replace(
            each,
            max_abs=tuple(found[0] for found in errors[each.name]),
            rms=tuple(found[1] for found in errors[each.name]),
        )
        for each in record.growth
    )


def _warm(subject: Stepper, recorded: RecordedRun) -> tuple[tuple[WarmError, ...], dict[str, float]]:
    """Errors of single steps from recorded states, and of a free run from the first of them."""
    names = [state.name for state in subject.contract.states if state.dtype.startswith("float")]
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    outputs: dict[str, float] = {}
    path = dict.fromkeys(names, 0.0)
    own: Arrays = recorded.warm[0]
    for t in range(recorded.record.window):
        before, after = recorded.warm[t], recorded.warm[t + 1]
        given, single = subject.step(recorded.clip[t], before)
        own = subject.step(recorded.clip[t], own)[1]
        for name, array in recorded.warm_outputs[t].items():
            outputs[name] = max(outputs.get(name, 0.0), rms(difference(given[name], array)))
        for name in names:
            path[name] += rms(difference(after[name], before[name]))
            eps = rms(difference(single[name], after[name]))
            rows[name].append((rms(difference(own[name], after[name])), eps, path[name]))
    warm = tuple(
        WarmError(
            name=name,
            measured=tuple(row[0] for row in rows[name]),
            predicted=(),
            missed=(),
            noise=(),
            one_step=tuple(row[1] for row in rows[name]),
            path=tuple(row[2] for row in rows[name]),
        )
        for name in names
    )
    return warm, outputs


def _one_step_verdict(warm: Sequence[WarmError], record: Record) -> Verdict:
    """In the place of the prediction: single steps against those of the peer."""
    if not record.one_step:
        return unchecked("prediction", "a recorded reference cannot be disturbed")
    ratios = {
        each.name: max(each.one_step) / (4 * max(record.one_step[each.name]) or 1e-300)
        for each in warm
        if each.name in record.one_step
    }
    if not ratios:
        return unchecked("prediction", "the model has no state of floats")
    worst = max(ratios, key=lambda name: ratios[name])
    says = f"{worst}: single steps from recorded states are off by {ratios[worst]:.2g} of 4 times what {record.peer} is"
    return judged("prediction", ratios[worst], 1.0, says, [worst])


def _recorded_step(recorded: RecordedRun, contract: StepContract) -> FunctionStepper:
    """Answers for the first step of the warm window."""
    return FunctionStepper(
        lambda _inputs, _states: (recorded.warm_outputs[0], recorded.warm[1]), contract, recorded.name
    )


def read_record(path: Path, contract: StepContract) -> RecordedRun:
    """Read a reference of this model.

    Raises:
        InputError: it cannot be read, is something else, or belongs to another model.
    """
    with library_errors(str(path), InputError, what="not a reference that `stepcell verify --record` wrote"):
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        record = msgspec.json.decode(arrays[REFERENCE_KEY].tobytes(), type=Record)
    if record.contract_hash != contract_hash(contract):
        raise InputError(
            f"{path}: the reference of another model: hash {record.contract_hash[:12]}..., this model has "
            f"{contract_hash(contract)[:12]}...",
            hint="weights, arguments and states must be the same; record it again from this model's source",
        )
    return RecordedRun(record, arrays, str(path))


def _part(arrays: Mapping[str, NDArray[Any]], prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
