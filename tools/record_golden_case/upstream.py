"""Upstream checkout: import of its modules, and their provenance."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stepcell.errors import UsageError

__all__ = ["function_of_file", "importable", "named_object", "provenance"]


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Make the modules in a folder importable inside the block; they are unloaded at its end."""
    path, before = str(folder), set(sys.modules)
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)
        for name in set(sys.modules) - before:
            if _is_in(folder, sys.modules[name]):
                del sys.modules[name]


def _is_in(folder: Path, module: object) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(folder)


def named_object(spec: str, option: str) -> Any:
    """Object of `package.module:name` or `folder/file.py:name`."""
    place, _, attribute = spec.rpartition(":")
    name = ".".join(Path(place).with_suffix("").parts) if place.endswith(".py") else place
    try:
        return getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{option} {spec}: expected package.module:name or file.py:name; {error}") from error


def function_of_file(spec: str) -> Callable[..., Any]:
    """The function `name` of `path/to/adapter.py:name`."""
    path, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location("golden_case_adapter", path)
    if module_spec is None or module_spec.loader is None or not Path(path).is_file():
        raise UsageError(f"--step {spec}: expected path/to/adapter.py:function")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return getattr(module, name)  # type: ignore[no-any-return]


def provenance(checkout: Path, repository: str | None, commit: str | None, *, patched: bool) -> dict[str, Any]:
    """Repository, commit and git blob ids of the files of the checkout that have been imported.

    Args:
        repository, commit: for a folder that is not a git checkout.
        patched: allow files that differ from the commit.

    Raises:
        UsageError: no git checkout and no repository or commit given, or a file differs from the commit.
    """
    files = sorted(Path(m.__file__).resolve() for m in list(sys.modules.values()) if _is_in(checkout, m))  # type: ignore[arg-type]
    blobs = {}
    for file in files:
        name, content = file.relative_to(checkout).as_posix(), file.read_bytes()
        blobs[name] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if commit is None and not patched and _git(checkout, "rev-parse", f"HEAD:./{name}") not in (blobs[name], None):
            raise UsageError(f"{name}: differs from the commit", hint="undo the change or describe it with --patch")
    repository = repository or _git(checkout, "remote", "get-url", "origin")
    commit = commit or _git(checkout, "rev-parse", "HEAD")
    if repository is None or commit is None:
        raise UsageError(f"{checkout}: no git checkout with an origin", hint="give --repository and --commit")
    name = "/".join(repository.removesuffix(".git").replace(":", "/").split("/")[-2:])
    return {"repo": name, "branch": None, "commit": commit, "git_blobs": blobs, "files": ", ".join(blobs)}


def _git(folder: Path, *arguments: str) -> str | None:
    result = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None if result.returncode == 0 else None
