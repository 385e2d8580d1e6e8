"""An ONNX model loaded in ONNX Runtime on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import ExportError
from stepcell.library_errors import library_errors
from stepcell.limits import FIRST_STEP_SECONDS, within_seconds
from stepcell.runtime.backends.onnxruntime.trial import choose_level

__all__ = ["OnnxSession"]


class OnnxSession:
    """Call it with arrays by name; it returns the outputs by name.

    Args:
        data: the serialised model, which is kept as `data`.
        subject: what error messages call it.

    Raises:
        ExportError: ONNX Runtime does not load the model, or (on a call) fails with these inputs.
        InputError: loading or the first call takes longer than the limit.
        DeviceError: not enough memory.
        StepcellError: ONNX Runtime ends its process while it loads the model.
    """

    def __init__(self, data: bytes, subject: str) -> None:
        import onnxruntime

        self.data = data
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        choose_level(data, options, subject)
        create = functools.partial(
            onnxruntime.InferenceSession, data, options, enable_fallback=0, providers=["CPUExecutionProvider"]
        )
        with library_errors(subject, ExportError, what="ONNX Runtime does not load it"):
            self._session = within_seconds(FIRST_STEP_SECONDS, create, f"{subject}: loading in ONNX Runtime")
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = 4
        self._has_run = False
        self._subject = subject
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with library_errors(self._subject, ExportError, what="the step fails in ONNX Runtime"):
            arrays = {name: np.asarray(array) for name, array in feeds.items()}  # it takes no NumPy scalars
            return dict(zip(self._names, self._run(arrays), strict=True))

    def _run(self, feeds: dict[str, NDArray[Any]]) -> list[Any]:
        run = functools.partial(self._session.run, None, feeds, self._options)
        if not self._has_run:
            results: list[Any] = within_seconds(
                FIRST_STEP_SECONDS, run, f"{self._subject}: the first step", stop=self._stop
            )
            self._has_run = True
            return results
        return list(run())

    def _stop(self) -> None:
        self._options.terminate = True
