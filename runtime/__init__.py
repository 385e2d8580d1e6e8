"""Runtime: the step loop, its back ends, engine building, streams and media. Imports neither torch nor triton.

`StepLoop` is imported on first use, so that `stepcell.plugins` can import `stepcell.runtime.cuda` without a circle.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepcell.runtime.loop.step_loop import StepLoop

__all__ = ["StepLoop"]


def __getattr__(name: str) -> Any:
    if name == "StepLoop":
        return importlib.import_module("stepcell.runtime.loop.step_loop").StepLoop
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
