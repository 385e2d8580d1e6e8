"""Counts what goes through the one door to CUDA, over the real runtime or a pretended one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

ALLOCATING = ("cudaMalloc", "cudaHostAlloc", "cudaFree", "cudaFreeHost")
CREATING = ("cudaStreamCreateWithFlags", "cudaEventCreate", "cudaGraphInstantiate", "cudaStreamBeginCapture")
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


class CountingCuda:
    """A CUDA runtime that counts its calls by name.

    Attributes:
        calls: how often each function was called.
        bytes: copied by `cudaMemcpyAsync` and `cudaMemcpy2DAsync`, by kind: 1 up, 2 down, 3 within the device.
    """

    def __init__(self, runtime: Any) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[int] = Counter()
        self._runtime = runtime

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._runtime, name)
        return self._counted(name, found) if name.startswith("cuda") and name[4:5].isupper() else found

    def _counted(self, name: str, function: Any) -> Any:
        if not callable(function) or isinstance(function, type):
            return function

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            if name == "cudaMemcpyAsync":
                self.bytes[int(arguments[3])] += arguments[2]
            elif name == "cudaMemcpy2DAsync":
                self.bytes[int(arguments[6])] += arguments[4] * arguments[5]
            return function(*arguments)

        wrapped: Callable[..., Any] = call
        return wrapped
