"""`make torture`: hostile conditions, and a table of what was promised and what was seen.

    python -m tools.torture --output benchmarks/results/torture.json

Every scenario runs the real command line in child processes. The exit code is 1 if a promise did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from tools.torture import kills, limits, surroundings
from tools.torture.common import Inputs, Outcome


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60, help="of each scenario with cameras")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="scenarios whose function has this in its name")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="stepcell-torture") as name:
        folder = Path(name)
        (folder / "inputs").mkdir()
        inputs = Inputs.make(folder / "inputs")
        scenarios: dict[str, Callable[[Path], Outcome | Iterator[Outcome]]] = {
            "kills": lambda place: kills.kills(inputs, place, options.kills, rng),
            "full_disk": lambda place: limits.full_disk(inputs, place),
            "read_only": lambda place: limits.read_only(inputs, place),
            "few_descriptors": lambda place: limits.few_descriptors(inputs, place),
            "little_memory": lambda place: limits.little_memory(inputs, place),
            "two_writers": lambda place: surroundings.two_writers(inputs, place, 30),
            "lost_cameras": lambda place: surroundings.lost_cameras(inputs, place, options.seconds, rng),
            "set_clock": lambda place: surroundings.set_clock(inputs, place, options.seconds, rng),
        }
        outcomes: list[Outcome] = []
        for scenario, run in scenarios.items():
            if options.only is None or options.only in scenario:
                started = time.monotonic()
                found = run(folder / scenario)
                for outcome in [found] if isinstance(found, Outcome) else found:
                    outcomes.append(outcome)
                    _print(outcome)
                    if options.output:
                        options.output.parent.mkdir(parents=True, exist_ok=True)
                        options.output.write_text(json.dumps(_document(outcomes, options.seed), indent=1) + "\n")
                print(f"({scenario}: {time.monotonic() - started:.0f} s)", file=sys.stderr)
    sys.exit(any(outcome.broken for outcome in outcomes))


def _print(outcome: Outcome) -> None:
    verdict = f"{len(outcome.broken)} BROKEN" if outcome.broken else "held"
    print(f"{outcome.name:32} {outcome.tried:4} times  {verdict:10} {outcome.seen}", flush=True)
    print(f"    promised: {outcome.promised}", flush=True)
    for line in outcome.broken[:20]:
        print(f"    {line}", flush=True)


def _document(outcomes: list[Outcome], seed: int) -> dict[str, object]:
    return {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("onnxruntime", "av", "numpy")}},
        "seed": seed,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


if __name__ == "__main__":
    main()
