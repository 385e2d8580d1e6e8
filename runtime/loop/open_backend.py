"""Opening a model file with the back end for its suffix and the requested device."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from stepcell.errors import DeviceError, MissingDependencyError, UsageError
from stepcell.runtime.backends.base import Backend, Device, Spin

__all__ = ["BACKENDS", "BackendName", "open_backend"]

logger = logging.getLogger(__name__)

ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
BackendName = Literal["auto", "onnxruntime", "ncnn"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
_VARIABLE = "STEPCELL_BACKEND"  # environment variable with what "auto" stands for


def open_backend(
    path: Path,
    device: str,
    *,
    allow_fallback: bool,
    keep_float16: bool,
    threads: int | None,
    spin: Spin = True,
    check_file: bool = True,
    backend: str = "auto",
) -> Backend:
    """Load a model. Arguments and errors are those of `StepLoop.open`."""
    parsed = Device.parse(device)
    name = _backend_name(backend)
    if backend == "ncnn" and (path.suffix in ENGINE_SUFFIXES or parsed.kind != "cpu"):
        raise UsageError(f"backend: ncnn runs ONNX files on the CPU, got {path.name} on {parsed}")
    if path.suffix.lower() in ENGINE_SUFFIXES:
        return _open_engine(path, parsed)
    if path.suffix.lower() == ".onnx":
        if parsed.kind == "cpu" and name != "onnxruntime":
            return _open_on_cpu(
                path, name, keep_float16=keep_float16, threads=threads, spin=spin, check_file=check_file
            )
        return _open_onnx(path, parsed, allow_fallback, keep_float16, threads, spin, check_file)
    kinds = ", ".join((".onnx", *ENGINE_SUFFIXES))
    raise UsageError(f"{path}: expected a model file ({kinds}), got suffix {path.suffix!r}")


def _backend_name(given: str) -> BackendName:
    """The back end of that name; for "auto" that of the environment variable, if it is set.

    Raises:
        UsageError: an unknown name.
    """
    source, text = "backend", given
    if given == "auto" and _VARIABLE in os.environ:
        source, text = _VARIABLE, os.environ[_VARIABLE]
    for name in BACKENDS:
        if name == text:
            return name
    raise UsageError(f"{source}: expected {', '.join(BACKENDS)}, got {text!r}")


def _open_on_cpu(
    path: Path, name: BackendName, *, keep_float16: bool, threads: int | None, spin: Spin, check_file: bool
) -> Backend:
    """An ONNX file in ncnn, or in ncnn or ONNX Runtime, whichever is faster."""
    from stepcell.runtime.backends.onnxruntime.backend import OrtBackend

    if keep_float16 and name == "ncnn":
        raise UsageError("backend: ncnn computes in float32, and float16 was to be kept", hint="--backend onnxruntime")
    source = OrtBackend(
        path, Device("cpu"), keep_float16=keep_float16, threads=threads, spin=spin, check_file=check_file
    )
    if keep_float16:
        return source
    from stepcell.runtime.backends.ncnn.choice import ChosenBackend

    try:
        return ChosenBackend(path, source, threads=threads, only_ncnn=name == "ncnn")
    except MissingDependencyError as error:
        if name == "ncnn":
            source.close()
            raise
        logger.debug(f"{path}: runs in ONNX Runtime: {error.message}")
    return source


def _open_onnx(
    path: Path,
    device: Device,
    allow_fallback: bool,
    keep_float16: bool,
    threads: int | None,
    spin: Spin,
    check_file: bool,
) -> Backend:
    from stepcell.runtime.backends.onnxruntime.backend import OrtBackend

    open_on = partial(OrtBackend, path, keep_float16=keep_float16, threads=threads, spin=spin, check_file=check_file)
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
