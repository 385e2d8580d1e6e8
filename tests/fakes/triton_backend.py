"""The module `triton_python_backend_utils`, which Triton's Python back end gives to a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from numpy.typing import NDArray


class Tensor:
    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._array


class TritonError:
    def __init__(self, message: str) -> None:
        self.message = message


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


@dataclass
class Request:
    tensors: dict[str, NDArray[Any]]

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self.tensors.items()]


class Metric:
    def __init__(self) -> None:
        self._value = 0.0

    def increment(self, value: float) -> None:
        self._value += value

    def value(self) -> float:
        return self._value


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"
    made: ClassVar[dict[str, Metric]] = {}  # by name, of all families

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name

    def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802  # the name in the back end
        return self.made.setdefault(self.name, Metric())


class Logger:
    @staticmethod
    def log_warn(text: str) -> None:
        pass
