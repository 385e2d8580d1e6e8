"""Access to cuda-bindings: its driver module, and the check of the status that every call returns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from stepcell.errors import DeviceError
from stepcell.optional_imports import require

__all__ = ["check", "driver", "initialised_driver"]

_MODULE = "cuda.bindings.driver"
_HINTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "fewer streams, smaller frames, or close other programs that use the GPU",
    "CUDA_ERROR_NO_DEVICE": "no GPU is visible; see `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_DEVICE": "see `stepcell doctor` for the devices of this machine",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the code was compiled for another GPU; see `stepcell doctor`",
}


def driver() -> Any:
    """The module `cuda.bindings.driver`.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
    """
    # Called for every CUDA call: the lookup takes 0.04 us, importlib 0.27 us.
    return sys.modules.get(_MODULE) or require(_MODULE, extra="cuda", purpose="running on a GPU")


def initialised_driver() -> Any:
    """The module after `cuInit`, which all other calls need. Calling it again costs next to nothing.

    Raises:
        DeviceError: there is no driver, or no GPU.
        MissingDependencyError: cuda-bindings is not installed.
    """
    module = driver()
    try:
        check(module.cuInit(0))
    except RuntimeError as error:  # cuda-bindings finds no libcuda
        raise DeviceError("no NVIDIA driver is installed", hint="see `stepcell doctor`") from error
    return module


def check(result: Sequence[Any]) -> Any:
    """The value of a driver call, which returns `(status,)` or `(status, value)`.

    Raises:
        DeviceError: the status is not success; the message has CUDA's name and text for it.
    """
    if result[0]:
        raise _error(result[0])
    return result[1] if len(result) > 1 else None


def _error(status: Any) -> DeviceError:
    text = driver().cuGetErrorString(status)[1]
    return DeviceError(
        f"CUDA: {status.name}: {text.decode() if text else 'unknown error'}", hint=_HINTS.get(status.name)
    )
