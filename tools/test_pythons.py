"""Run the tests that need no torch on other Pythons, each in an environment of its own: `make test-pythons`.

    python -m tools.test_pythons 3.10 3.13

An interpreter is `python3.X` on the path or one of pyenv's; a version that is not installed is named and left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "build" / "test-models"
EXTRAS = "ort,ncnn,rtx,cuda,video,metrics,fast-events,aedat4,es,hdf5,rosbag,dv,test"


def main(versions: list[str]) -> None:
    found = {version: interpreter(version) for version in versions}
    for version, python in found.items():
        if python is None:
            print(f"Python {version}: not installed, not tested", flush=True)
        else:
            run_tests(version, python)


def interpreter(version: str) -> str | None:
    """The path of a Python that runs, since a shim of pyenv may have no version behind it."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for python in (shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))):
        if python and not subprocess.run([python, "--version"], capture_output=True, check=False).returncode:
            return python
    return None


def run_tests(version: str, python: str) -> None:
    """In build/python3.X, with the pinned packages."""
    environment = ROOT / "build" / f"python{version}"
    if not environment.exists():
        subprocess.run([python, "-m", "venv", environment], check=True)
    python = str(environment / "bin" / "python")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    install = ["tools/install_pinned.py", f".[{EXTRAS}]"]
    test = [
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow",
        "--numprocesses",
        "auto",
        "--maxprocesses",
        "4",
        "--dist",
        "loadfile",
    ]
    subprocess.run([python, *install], check=True, cwd=ROOT, env=clean)
    print(f"Python {version}: tests without torch", flush=True)
    settings = {"OMP_NUM_THREADS": "1", "STEPCELL_TEST_MODELS": str(MODELS)}
    subprocess.run([python, *test], check=True, cwd=ROOT, env=clean | settings)


if __name__ == "__main__":
    main(sys.argv[1:])
