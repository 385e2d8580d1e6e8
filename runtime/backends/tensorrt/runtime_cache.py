"""TensorRT-RTX's runtime cache: kernels that it compiled for this GPU, kept beside the engine.

An RTX engine holds kernels in a form that is compiled when it first runs; with the cache that is
done once per machine. The file is TensorRT's own, which accepts it on the same GPU, driver and
version only; anything else is compiled anew and the file replaced.
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
    """The cache of one engine, read from its file where TensorRT takes that.

    Args:
        engine: path of the engine.
        config: TensorRT-RTX's runtime configuration, which is given the cache.
    """

    def __init__(self, engine: Path, config: Any) -> None:
        self._path = cache_path(engine)
        cache = config.create_runtime_cache()
        self._cache: Any = cache
        self._saved = b""  # digest of what the file holds
        try:
            data = read_bytes(self._path) if self._path.exists() else b""
        except InputError as error:
            logger.warning(f"{error.message}: kernels are compiled anew")
            data = b""
        if data and cache.deserialize(data):
            self._saved = hashlib.sha256(bytes(cache.serialize())).digest()
        elif data:
            logger.warning(
                f"{self._path}: is damaged or another GPU's, driver's or TensorRT's: kernels are compiled anew"
            )
            cache.reset()
        config.set_runtime_cache(cache)

    def save(self) -> None:
        """Write what TensorRT has compiled since; a folder that cannot be written is logged."""
        data = bytes(self._cache.serialize())
        digest = hashlib.sha256(data).digest()
        if digest == self._saved:
            return
        self._saved = digest
        try:
            write_atomic(self._path, data)
        except OutputError as error:
            logger.warning(f"{error.message}: the next start compiles the kernels again")
