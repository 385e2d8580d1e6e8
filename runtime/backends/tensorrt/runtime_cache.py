"""Runtime cache of TensorRT-RTX: kernels compiled for this GPU, in a file beside the engine.

An RTX engine holds kernels in a form that is compiled when it first runs; with the cache that happens once per machine.
The format of the file is TensorRT's, which accepts it on the same GPU, driver and version only. Otherwise the kernels
are compiled again and the file is replaced.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from stepcell.errors import InputError, OutputError
from stepcell.files import read_bytes, write_atomic

__all__ = ["RuntimeCache", "cache_path"]

logger = logging.getLogger(__name__)


def cache_path(engine: Path) -> Path:
    """`model.engine.cache` beside `model.engine`."""
    return engine.with_name(f"{engine.name}.cache")


class RuntimeCache:
    """The runtime cache of one engine, read from its file if TensorRT accepts that.

    Args:
        engine: path of the engine.
        config: runtime configuration of TensorRT-RTX, which gets the cache.
    """

    def __init__(self, engine: Path, config: Any) -> None:
        self._path = cache_path(engine)
        cache = config.create_runtime_cache()
        self._cache: Any = cache
        self._saved = b""  # SHA-256 of the contents of the file
        try:
            data = read_bytes(self._path) if self._path.exists() else b""
        except InputError as error:
            logger.warning(f"{error.message}: the kernels are compiled again")
            data = b""
        if data and cache.deserialize(data):
            self._saved = hashlib.sha256(bytes(cache.serialize())).digest()
        elif data:
            logger.warning(
                f"{self._path}: is damaged, or is for another GPU, driver or TensorRT: the kernels are compiled again"
            )
            cache.reset()
        config.set_runtime_cache(cache)

    def save(self) -> None:
        """Write the kernels that TensorRT has compiled since. A folder that cannot be written to is logged."""
        data = bytes(self._cache.serialize())
        digest = hashlib.sha256(data).digest()
        if digest == self._saved:
            return
        self._saved = digest
        try:
            write_atomic(self._path, data)
        except OutputError as error:
            logger.warning(f"{error.message}: the next start compiles the kernels again")
