"""Fuzz every input for a while: `make fuzz`, or `python -m tests.fuzz --seconds 3600 contract onnx`."""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

from tests.fuzz.harness import fuzz
from tests.fuzz.inputs import INPUTS


def main() -> None:
    """Print a line for each input, and the stack of each fault; exit code 1 if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("inputs", nargs="*", choices=[[], *(each.name for each in INPUTS)])
    parser.add_argument("--seconds", type=float, default=600, help="for each input")
    parser.add_argument("--cases", type=int, help="for each input, at most")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="folder for files that end in a fault")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("STEPCELL_FIRST_STEP_SECONDS", "10")
    logging.disable(logging.CRITICAL)
    faults = 0
    for what in INPUTS:
        if options.inputs and what.name not in options.inputs:
            continue
        found = fuzz(what, seed=options.seed, cases=options.cases, seconds=options.seconds, keep=options.keep)
        print(f"{what.name}: {found.cases} cases, seed {options.seed}: {dict(found.ends)}", flush=True)
        for stack in found.faults.values():
            print(stack, flush=True)
        faults += len(found.faults)
    raise SystemExit(min(faults, 1))


if __name__ == "__main__":
    main()
