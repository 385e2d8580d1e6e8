"""Opening a model file with the back end for its suffix and the requested device."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from stepcell.errors import DeviceError, UsageError
from stepcell.runtime.backends.base import Backend, Device

__all__ = ["open_backend"]

logger = logging.getLogger(__name__)

ENGINE_SUFFIXES = (".engine", ".plan", ".trt")


def open_backend(
    path: Path, device: str, *, allow_fallback: bool, keep_float16: bool, threads: int | None, check_file: bool = True
) -> Backend:
    """Load a model. Arguments and errors are those of `StepLoop.open`."""
    parsed = Device.parse(device)
    if path.suffix.lower() in ENGINE_SUFFIXES:
        return _open_engine(path, parsed)
    if path.suffix.lower() == ".onnx":
        return _open_onnx(path, parsed, allow_fallback, keep_float16, threads, check_file)
    kinds = ", ".join((".onnx", *ENGINE_SUFFIXES))
    raise UsageError(f"{path}: expected a model file ({kinds}), got suffix {path.suffix!r}")


def _open_onnx(
    path: Path, device: Device, allow_fallback: bool, keep_float16: bool, threads: int | None, check_file: bool
) -> Backend:
    from stepcell.runtime.backends.onnxruntime.backend import OrtBackend

    open_on = partial(OrtBackend, path, keep_float16=keep_float16, threads=threads, check_file=check_file)
    try:
        return open_on(device)
    except DeviceError as error:
        if device.kind == "cpu" or not allow_fallback:
            raise
        logger.warning(f"{error.message}: runs on the CPU instead, as allowed")
    return open_on(Device("cpu"))


def _open_engine(path: Path, device: Device) -> Backend:
    if device.kind == "cpu":
        raise DeviceError(
            f"{path}: a TensorRT engine runs on a GPU only, and the requested device is the CPU",
            hint="--device cuda, or run the .onnx file that the engine was built from",
        )
    from stepcell.runtime.backends.tensorrt.backend import TensorRTBackend

    backend: Backend = TensorRTBackend(path, device)
    return backend
