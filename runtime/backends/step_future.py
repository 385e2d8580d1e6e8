"""A step that was begun and whose outputs are waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from stepcell.errors import StepcellError

__all__ = ["Pending"]

T = TypeVar("T")


class Pending(Generic[T]):
    """Outputs that may not be there yet.

    Args:
        collect: waits for them; called once.
    """

    def __init__(self, collect: Callable[[], T]) -> None:
        self._collect: Callable[[], T] | None = collect
        self._result: T | StepcellError

    def wait(self) -> T:
        """The outputs, once they are there; again gives the same ones.

        Raises:
            DeviceError: the device failed in this step; again raises it again.
        """
        if self._collect is not None:
            collect, self._collect = self._collect, None
            try:
                self._result = collect()
            except StepcellError as error:
                self._result = error
        if isinstance(self._result, StepcellError):
            raise self._result
        return self._result
