"""Exceptions. A message names the subject, the rule and the value that breaks it; `hint` says what to do.

The class determines the exit code of the command line:
0 ok, 1 failure, 2 usage, 3 verification mismatch, 4 incompatible engine,
5 missing dependency or plugin, 6 device or memory.
"""

from __future__ import annotations

from stepcell.display import displayed

__all__ = [
    "BuildError",
    "CheckpointError",
    "ContractError",
    "DeviceError",
    "EngineMismatchError",
    "EvaluationError",
    "ExportError",
    "InputError",
    "MissingDependencyError",
    "OutputError",
    "ParityError",
    "PluginError",
    "StateError",
    "StepcellError",
    "UsageError",
]


class StepcellError(Exception):
    """Base class of all errors that stepcell raises.

    Args:
        message: subject, rule and value, in one or two sentences. Secrets in URLs are hidden, and control characters
            escaped.
        hint: what the user can do, or None.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message: str = displayed(message)
        self.hint: str | None = None if hint is None else displayed(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\nHint: {self.hint}" if self.hint else self.message


class UsageError(StepcellError):
    """An argument is malformed, or two arguments contradict each other."""

    exit_code = 2


class ContractError(StepcellError):
    """A state contract is missing, malformed, of an unknown version, or does not fit its model."""


class EvaluationError(StepcellError):
    """A graph holds something that the evaluator in numpy does not implement."""


class CheckpointError(StepcellError):
    """A checkpoint cannot be read safely, or lacks what its family needs."""


class ExportError(StepcellError):
    """A module cannot be exported as a single-step model."""


class BuildError(StepcellError):
    """TensorRT refused a model, or built no engine."""


class InputError(StepcellError):
    """A frame, clip or array given by the user cannot be used."""


class StateError(StepcellError):
    """A hidden state has the wrong name, shape or dtype."""


class OutputError(StepcellError):
    """A result cannot be written to the requested path."""


class ParityError(StepcellError):
    """An exported model differs from its reference by more than the tolerance."""

    exit_code = 3


class EngineMismatchError(StepcellError):
    """An engine does not fit its sidecar, this TensorRT or this device."""

    exit_code = 4


class MissingDependencyError(StepcellError):
    """A package that the request needs is not installed or does not load."""

    exit_code = 5


class PluginError(StepcellError):
    """The fused TensorRT plugin was requested and is not available."""

    exit_code = 5


class DeviceError(StepcellError):
    """The requested device is absent, failed or ran out of memory."""

    exit_code = 6
