"""Whether the loops over events are compiled: they are, where numba is installed."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

__all__ = ["compiled_loops"]

logger = logging.getLogger(__name__)


@functools.cache
def compiled_loops() -> ModuleType | None:
    """The module `loops`, or None: numba is not installed, does not load or is switched off, so NumPy is used."""
    try:
        from stepcell.runtime.media.events import loops
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "numba"
        reason = "numba is not installed" if missing else f"numba does not load: {error}"
        logger.info(f"events are read with NumPy, which is slower ({reason}): pip install 'stepcell[fast-events]'")
        return None
    return loops if loops.COMPILES else None
