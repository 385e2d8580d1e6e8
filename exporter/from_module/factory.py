"""Import of a module from the user's own code: `package.module:factory`."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from stepcell.errors import ExportError, UsageError

__all__ = ["module_from_factory"]


def module_from_factory(spec: str, arguments: Mapping[str, object]) -> nn.Module:
    """Import `package.module` from the import path or the current folder and call its factory.

    Args:
        spec: `package.module:factory`; the factory returns a torch module.
        arguments: keyword arguments for it.

    Raises:
        UsageError: another form, no such module or no such name in it.
        ExportError: the factory fails or returns something else than a torch module.
    """
    name, _, attribute = spec.partition(":")
    if not name or not attribute:
        raise UsageError(f"--module: expected package.module:factory, got {spec!r}")
    with _current_folder_on_path():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"--module {spec}: cannot import {name}: {error}") from error
        factory = getattr(module, attribute, None)
        if not callable(factory):
            raise UsageError(f"--module {spec}: {name} has no callable {attribute!r}")
        try:
            model = factory(**arguments)
        except Exception as error:  # the user's code may raise anything
            raise ExportError(f"--module {spec}: the factory failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ExportError(
            f"--module {spec}: expected a torch module, got {type(model).__name__}", hint="see docs/own-module.md"
        )
    return model


@contextlib.contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """Imports find modules of the current folder, until the factory has returned."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
