"""Optional packages: importing one, or an error that names the extra which installs it."""

from __future__ import annotations

import importlib
from types import ModuleType

from stepcell.errors import MissingDependencyError

__all__ = ["require"]


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`.

    Args:
        extra: the extra of stepcell that installs it.
        purpose: what needs it, for the message, for example "reading video files".

    Raises:
        MissingDependencyError: it is not installed or does not load.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{purpose} needs the package {module.split('.')[0]!r}, which is not installed",
            hint=f"pip install 'stepcell[{extra}]'",
        ) from error
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"{purpose} needs the package {module.split('.')[0]!r}, which does not load: {error}",
            hint="`stepcell doctor` shows what loads on this machine",
        ) from error
