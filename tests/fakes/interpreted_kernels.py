"""The Triton sources of the kernels in Triton's interpreter: programs run one after another on the CPU."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import triton

from stepcell.plugins.kernels.signature import SOURCES

__all__ = ["interpreted", "interpreted_source"]

_PACKAGE = "stepcell.plugins.kernels.triton"


def _import_interpreted() -> dict[str, ModuleType]:
    """Import copies of all sources that Triton interprets.

    Triton decides when a kernel is decorated, so the copies are taken out of `sys.modules` again: whoever imports
    the sources later, the compiler for one, gets kernels that compile.
    """
    package = importlib.import_module(_PACKAGE)
    sources = ("language", "conv", "split", "epilogue", *sorted(set(SOURCES.values())))
    names = [f"{_PACKAGE}.{source}" for source in sources]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        modules = {source: importlib.import_module(name) for source, name in zip(sources, names, strict=True)}
    for source, name in zip(sources, names, strict=True):
        del sys.modules[name]
        delattr(package, source)
    sys.modules.update(others)
    for name, module in others.items():
        setattr(package, name.rpartition(".")[2], module)
    return modules


_MODULES = _import_interpreted()


def interpreted_source(source: str) -> ModuleType:
    """A module of kernels/triton, such as "epilogue"."""
    return _MODULES[source]


def interpreted(kernel: str) -> Any:
    """A kernel, such as "gru_gates"."""
    return getattr(_MODULES[SOURCES[kernel]], kernel)
