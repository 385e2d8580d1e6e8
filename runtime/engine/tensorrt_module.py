"""Import of TensorRT: Enterprise (`tensorrt`) or TensorRT-RTX (`tensorrt_rtx`); logger and error messages.

Both have the same Python interface as far as stepcell uses it, so other modules take the imported module from here
and check the flavour only where behaviour differs.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from stepcell.errors import MissingDependencyError, UsageError
from stepcell.optional_imports import require

__all__ = ["FLAVORS", "Flavor", "Messages", "TensorRT", "dtype_name", "load_tensorrt", "make_logger", "no_collection"]

logger = logging.getLogger(__name__)

Flavor = Literal["tensorrt", "tensorrt-rtx"]
FLAVORS: tuple[Flavor, ...] = get_args(Flavor)

_MODULES: dict[Flavor, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS: dict[Flavor, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
_NAMES: dict[Flavor, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_DTYPES = {
    "HALF": "float16",
    "FLOAT": "float32",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
    "BF16": "bfloat16",
}
# TensorRT's plugin registry keeps using the logger of an earlier builder, without a reference: freeing one crashes.
_loggers: list[Any] = []
# Nodes of ONNX functions have the same names in every cell; stepcell never looks them up by name.
_UNQUERYABLE = "already exists, the output tensors of this new instance will not be queryable"


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT.

    Attributes:
        flavor: "tensorrt" or "tensorrt-rtx".
        module: the vendor's Python module.
    """

    flavor: Flavor
    module: Any

    @property
    def is_rtx(self) -> bool:
        return self.flavor == "tensorrt-rtx"

    @property
    def name(self) -> str:
        """Display name, such as "TensorRT-RTX"."""
        return _NAMES[self.flavor]

    @property
    def version(self) -> str:
        """Version of the module, such as "1.7.1.116" or "10.3.0"."""
        return str(self.module.__version__)


def load_tensorrt(flavor: str = "auto") -> TensorRT:
    """Import a TensorRT flavour.

    Args:
        flavor: "tensorrt", "tensorrt-rtx", or "auto": Enterprise if it can be imported, else TensorRT-RTX.

    Raises:
        UsageError: unknown flavour.
        MissingDependencyError: it is not installed, or cannot be loaded.
    """
    for known in FLAVORS:
        if flavor == known:
            purpose = f"the flavour {flavor!r}"
            return TensorRT(known, require(_MODULES[known], extra=_EXTRAS[known], purpose=purpose))
    if flavor != "auto":
        raise UsageError(f"flavor: expected auto, {' or '.join(FLAVORS)}, got {flavor!r}")
    reasons = []
    for candidate in FLAVORS:
        try:
            found = load_tensorrt(candidate)
        except MissingDependencyError as error:
            reasons.append(error.message)
            continue
        if reasons and "does not load" in reasons[0]:  # installed but broken: say so
            logger.warning(f"note: {reasons[0]}; {found.name} is used instead")
        return found
    raise MissingDependencyError(
        "no TensorRT is installed: " + "; ".join(reasons),
        hint="pip install 'stepcell[rtx]' builds with no GPU; a Jetson brings the module tensorrt with JetPack",
    )


def dtype_name(dtype: Any) -> str:
    """Name of a TensorRT `DataType` in the contract; TensorRT's own name for types that the contract lacks."""
    name = str(dtype.name)
    return _DTYPES.get(name, name.lower())


@dataclass
class Messages:
    """Messages that TensorRT logged during an operation."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)  # lists of an engine's layers, see `stepcell.runtime.engine.layers`

    def explain(self) -> str:
        """The errors as one line.

        TensorRT-RTX adds to every error that the machine has no driver; that is left out if there is another error.
        """
        about_model = [text for text in self.errors if "catchCudaError" not in text]
        return "; ".join(dict.fromkeys(about_model or self.errors)) or "TensorRT gave no reason"


class _PausedCollection:
    """Counts the blocks that need garbage collection off, over all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._was_enabled = False

    def enter(self) -> None:
        with self._lock:
            if self._blocks == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._blocks += 1

    def leave(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0 and self._was_enabled:
                gc.enable()


_paused_collection = _PausedCollection()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Pause Python's garbage collection in a block, or in a function that this decorates.

    TensorRT calls the logger while it holds a lock that the destructors of its objects take. A collection in
    such a call that found the builder of an earlier, failed build would wait for that lock forever. Collection
    is off for the process until the last block in any thread has ended.
    """
    _paused_collection.enter()
    try:
        yield
    finally:
        _paused_collection.leave()


def make_logger(trt: Any, messages: Messages, *, verbose: bool = False) -> Any:
    """A `trt.ILogger` that collects errors and warnings instead of printing them.

    Args:
        trt: the vendor's module.
        messages: collects them.
        verbose: also log every message immediately.
    """
    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]  # the base depends on the module
        def __init__(self) -> None:
            base.__init__(self)  # required by the bindings; super() does not initialise the object fully

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                messages.errors.append(msg)
            elif severity == trt.ILogger.WARNING and _UNQUERYABLE not in msg:
                messages.warnings.append(msg)
            elif msg.startswith("Layers:"):
                messages.layers.append(msg)
            if verbose:
                logger.warning(f"[{severity.name.lower()}] {msg}")

    made = Logger()
    _loggers.append(made)
    return made
