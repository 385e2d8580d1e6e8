"""An ONNX model loaded in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from stepcell.errors import ExportError

__all__ = ["OnnxSession"]


class OnnxSession:
    """Call it with arrays by name; it returns the outputs by name.

    Args:
        data: the serialised model, which is kept as `data`.
        subject: what error messages call it.

    Raises:
        ExportError: ONNX Runtime does not load the model, or (on a call) fails with these inputs.
    """

    def __init__(self, data: bytes, subject: str) -> None:
        import onnxruntime

        self.data = data
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class per failure and no common base
            raise ExportError(f"{subject}: ONNX Runtime does not load it: {_first_line(error)}") from error
        self._subject = subject
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            return dict(zip(self._names, self._session.run(None, dict(feeds)), strict=True))
        except Exception as error:
            raise ExportError(f"{self._subject}: the step fails in ONNX Runtime: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
