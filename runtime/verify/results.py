"""Results of a verification: one verdict per question, the error growth per tensor, and what was compared with what."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from stepcell.runtime.engine.layers import EngineLayer

__all__ = ["Growth", "Report", "Verdict", "failed", "judged", "unchecked"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one question about a model.

    Attributes:
        name: name of the check: "growth", "prediction", "storage", ...
        passed: None: the question could not be asked here, and `says` gives the reason.
        value, limit: the number that was found and the largest one that passes (the smallest, where `at_least`).
        says: one sentence for a person.
        subjects: states or outputs that the sentence is about, the worst first.
    """

    name: str
    passed: bool | None
    says: str
    value: float | None = None
    limit: float | None = None
    at_least: bool = False
    subjects: tuple[str, ...] = ()


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """Free-running error of one output or state against the reference.

    Attributes:
        name: output, or state.
        kind: "output" or "state".
        scale: largest absolute value of the reference over the run.
        steps: the compared steps, counted from 1.
        max_abs, rms: error of the subject at these steps; infinite where it holds NaN or Inf.
            Of integers and booleans `rms` is the share of the elements that differ (`measure.deviation`).
        peer_rms: the same for the peer, the file as written or the module in the file's precision; empty: no peer.
    """

    name: str
    kind: str
    scale: float
    steps: tuple[int, ...]
    max_abs: tuple[float, ...]
    rms: tuple[float, ...]
    peer_rms: tuple[float, ...] = ()
    is_share: bool = False


class WarmError(msgspec.Struct, frozen=True, kw_only=True):
    """Error of one state inside the warm window, measured and predicted from one-step errors.

    Attributes:
        name: the state.
        measured, predicted, missed: rms of the free-running error, of its prediction and of their difference,
            for each step of the window.
        noise: what `missed` may be by rounding alone.
        one_step: rms of the error of a single step from the reference's state.
        path: rms distance the reference state has travelled since the window began.
    """

    name: str
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    missed: tuple[float, ...]
    noise: tuple[float, ...]
    one_step: tuple[float, ...]
    path: tuple[float, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole result of `stepcell verify`.

    Attributes:
        model, reference: the two sides, as the user named them.
        subject_runs, reference_runs: what computed each side, with versions.
        device: where the subject ran.
        input: name of the clip, with its seed or path.
        shapes: shapes of the data inputs.
        steps: compared from the initial states.
        warm_up: steps of the reference before the warm window.
        model_sha256: of the file that was verified.
        date: ISO 8601, UTC.
        versions: versions of stepcell, numpy, the back end, the driver.
        verdicts, growth, warm: the findings.
        seconds: the whole run took.
        layers: layers of the engine, where one was verified.
    """

    model: str
    reference: str
    subject_runs: str
    reference_runs: str
    device: str
    input: str
    shapes: dict[str, tuple[int, ...]]
    steps: int
    warm_up: int
    model_sha256: str
    date: str
    versions: dict[str, str]
    verdicts: tuple[Verdict, ...]
    growth: tuple[Growth, ...]
    warm: tuple[WarmError, ...]
    seconds: float
    layers: tuple[EngineLayer, ...] = ()

    @property
    def passed(self) -> bool:
        """No verdict failed."""
        return not failed(self.verdicts)


def failed(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Those that failed."""
    return [verdict for verdict in verdicts if verdict.passed is False]


def judged(
    name: str, value: float, limit: float, says: str, subjects: Sequence[str] = (), *, at_least: bool = False
) -> Verdict:
    """A verdict whose number decides; NaN fails."""
    passed = value >= limit if at_least else value <= limit
    if math.isnan(value):
        passed = False
    return Verdict(
        name=name,
        passed=bool(passed),
        says=says,
        value=float(value),
        limit=float(limit),
        at_least=at_least,
        subjects=tuple(subjects),
    )


def unchecked(name: str, reason: str) -> Verdict:
    """A question that could not be asked."""
    return Verdict(name=name, passed=None, says=reason)
