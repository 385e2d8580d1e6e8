"""Fuzz every input for a while: `make fuzz`, or `python -m tests.fuzz --seconds 3600 contract onnx`.

Each input has a process of its own, so that one that a library ends is a fault of that input. With Atheris installed
(`pip install -e '.[fuzz]'`) the cases of inputs that Python code reads are guided by coverage.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.fuzz.child import fuzz_one

NAMES = (
    *("contract", "onnx", "build", "fuse", "checkpoint", "old-checkpoint", "safetensors", "sidecar", "snapshot"),
    *("kernel", "npy", "npz", "dat", "raw", "event-text", "video"),
)
LIBRARIES = ("atheris", "av", "msgspec", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "safetensors", "torch")


def main() -> None:
    """Print a line for each input, and the stack of each fault; exit code 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", choices=[[], *NAMES])
    parser.add_argument("--seconds", type=float, default=600, help="for each input")
    parser.add_argument("--cases", type=int, help="for each input, at most")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--random", action="store_true", help="not guided by coverage")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="folder for files that end in a fault")
    parser.add_argument("--report", type=Path, help="JSON to which the figures are added")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    options.random |= importlib.util.find_spec("atheris") is None
    faults = 0
    for name in options.inputs or NAMES:
        found = _in_a_child(name, options)
        print(f"{name}: {found['cases']} cases, seed {options.seed}: {found['ends']}", flush=True)
        for stack in found["faults"].values():
            print(stack, flush=True)
        faults += len(found["faults"])
        if options.report:
            _add(options.report, name, found)
    raise SystemExit(min(faults, 1))


def _in_a_child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=fuzz_one, args=(name, options, sender))
    started = time.monotonic()
    child.start()
    sender.close()
    found: dict[str, Any] = {"cases": 0, "ends": {}, "faults": {}}
    with contextlib.suppress(EOFError):
        while True:
            found = receiver.recv()
    child.join()
    if child.exitcode:
        end = signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"exit code {child.exitcode}"
        found["faults"]["process"] = f"the process of {name} ended with {end}, after at least {found['cases']} cases"
    return {**found, "seed": options.seed, "guided": not options.random, "seconds": round(time.monotonic() - started)}


def _add(path: Path, name: str, found: dict[str, Any]) -> None:
    document = json.loads(path.read_text()) if path.exists() else {"inputs": {}}
    libraries = {}
    for each in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            libraries[each] = version(each)
    document |= {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": sys.version.split()[0], **libraries},
    }
    document["inputs"].setdefault(name, []).append({**found, "faults": sorted(found["faults"])})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
