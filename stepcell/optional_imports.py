"""Optional packages: importing one, or an error that names the extra which installs it."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

from stepcell.errors import MissingDependencyError

__all__ = ["require"]

# Versions that load and give wrong results: before 17, PyAV converts full-range and BT.2020 colours as limited BT.601.
_OLDEST = {"av": (17, 1)}


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`.

    Args:
        extra: the extra of stepcell that installs it.
        purpose: what needs it, for the message, for example "reading video files".

    Raises:
        MissingDependencyError: it is not installed, does not load or is too old.
    """
    try:
        found = importlib.import_module(module)
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
    oldest = _OLDEST.get(module)
    if oldest and tuple(int(part) for part in re.findall(r"\d+", found.__version__)[: len(oldest)]) < oldest:
        raise MissingDependencyError(
            f"{purpose} needs the package {module!r} {'.'.join(map(str, oldest))} or later, got {found.__version__}",
            hint=f"pip install 'stepcell[{extra}]'",
        )
    return found
