"""Counting driver: counts the calls that go to a CUDA driver, the real one or a fake one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

ALLOCATING = ("cuMemAlloc", "cuMemHostAlloc", "cuMemFree", "cuMemFreeHost")
CREATING = ("cuStreamCreate", "cuEventCreate", "cuGraphInstantiate", "cuStreamBeginCapture")
WAITING = ("cuStreamSynchronize", "cuCtxSynchronize", "cuMemcpy")
_COPIES = {"cuMemcpyHtoDAsync": "up", "cuMemcpyDtoHAsync": "down", "cuMemcpyDtoDAsync": "within"}


class CountingDriver:
    """Stands for `cuda.bindings.driver` and passes every call on.

    Attributes:
        calls: number of calls of each function.
        bytes: copied "up" to the device, "down" to the host and "within" the device.
    """

    def __init__(self, driver: Any) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._driver = driver

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._driver, name)
        return self._counted(name, found) if name.startswith("cu") else found

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            if name in _COPIES:
                self.bytes[_COPIES[name]] += arguments[2]
            return function(*arguments)

        return call
