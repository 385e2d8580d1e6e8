"""The Triton sources of the kernels in Triton's interpreter: programs run one after another on the CPU."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter

from stepcell.plugins.kernels.signature import SOURCES

__all__ = ["interpreted", "interpreted_source", "launch"]

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


# What Triton does over and over takes half of the time: at every call of a function inside a launch it puts its
# interpreted language in place, which it has done at the launch, and at every look-up it makes a table of dtypes.


def _in_place_once(function: Any) -> Any:
    languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if languages and not any(tl.core.is_builtin(language.load) for language in languages):
        return interpreter._LangPatchScope()
    return _put_in_place(function)


def _dtype_of(kind: Any) -> Any:
    return _pointers(kind) if kind.scalar.is_ptr() else _of_scalar(kind.scalar)


_put_in_place, _pointers = interpreter._patch_lang, interpreter._get_np_dtype
_of_scalar = functools.cache(interpreter._get_np_dtype)
interpreter._patch_lang, interpreter._get_np_dtype = _in_place_once, _dtype_of


def interpreted_source(source: str) -> ModuleType:
    """A module of kernels/triton, such as "epilogue"."""
    return _MODULES[source]


def interpreted(kernel: str) -> Any:
    """A kernel, such as "gru_gates"."""
    return getattr(_MODULES[SOURCES[kernel]], kernel)


def launch(kernel: str, grid: tuple[int, ...], arguments: Sequence[Any], values: Mapping[str, Any]) -> None:
    """Run a kernel; integers are checked for overflow in the first of equal launches, since they follow from sizes."""
    sizes = [argument for argument in arguments if isinstance(argument, int)]
    key = (kernel, grid, *sizes, *values.items())
    before = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(before, sanitize_overflow=key not in _checked)
    try:
        interpreted(kernel)[grid](*arguments, **values)
    finally:
        interpreter.interpreter_builder.options = before
    _checked.add(key)


_checked: set[Hashable] = set()
