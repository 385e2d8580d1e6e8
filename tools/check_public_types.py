"""Check that the types of all public names are complete, as pyright sees them: `make lint`.

`pyright --verifytypes` judges every module of a package. Here only the names in __all__ of the public modules count,
with their members and with every type that they use.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PUBLIC = ("stepcell", "stepcell.models", "stepcell.events", "stepcell.client", "stepcell.errors")


def main() -> None:
    places = [f"{value.__module__}.{value.__qualname__}" for value in public_values()]
    faults = []
    symbols = verified()
    for symbol in symbols:
        name = symbol["name"]
        public = any(name == place or name.startswith(f"{place}.") for place in places)
        if public and (not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]):
            faults.append(f"{name}: {' '.join(found['message'] for found in symbol['diagnostics'])}")
    unseen = set(places) - {symbol["name"] for symbol in symbols}
    print(
        "\n".join([*faults, *(f"{name}: not seen by pyright" for name in sorted(unseen))])
        or f"{len(places)} public names are typed"
    )
    raise SystemExit(bool(faults))


def public_values() -> list[Any]:
    modules = [importlib.import_module(name) for name in PUBLIC]
    return [getattr(module, name) for module in modules for name in module.__all__]


def verified() -> list[dict[str, Any]]:
    """What pyright says of every symbol; it takes the Python that comes first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pyright = str(Path(sys.executable).with_name("basedpyright"))
    command = [pyright, "--verifytypes", "stepcell", "--ignoreexternal", "--outputjson"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PATH": path}, cwd="/"
    )
    symbols: list[dict[str, Any]] = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    return symbols


if __name__ == "__main__":
    main()
