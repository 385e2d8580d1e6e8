"""`make torture`: hostile conditions, and a table of what was promised and what was seen.

    python -m tools.torture --output benchmarks/results/torture.json
    python -m tools.torture --table benchmarks/results/torture.json

The JSON file keeps the runs that are in it, so that the 500 kills can be made in several sittings, each with its seed;
the table, in Markdown, has them together.
Every scenario runs the real command line in child processes. The exit code is 1 if a promise did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnxruntime

from tools.torture import kills, limits, surroundings
from tools.torture.common import Inputs, Outcome

_COUNT = re.compile(r"(?<!exit )\b\d+")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60, help="of each scenario with cameras")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="scenarios whose function has this in its name")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of this file; run nothing")
    options = parser.parse_args()
    if options.table is not None:
        print(_table(json.loads(options.table.read_text())["runs"]))
        return
    rng = random.Random(options.seed)
    earlier = json.loads(options.output.read_text())["runs"] if options.output and options.output.exists() else []
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
                        document = {"runs": [*earlier, _run(outcomes, options.seed)]}
                        options.output.parent.mkdir(parents=True, exist_ok=True)
                        options.output.write_text(json.dumps(document, indent=1) + "\n")
                print(f"({scenario}: {time.monotonic() - started:.0f} s)", file=sys.stderr)
    sys.exit(any(outcome.broken for outcome in outcomes))


def _print(outcome: Outcome) -> None:
    verdict = f"{len(outcome.broken)} BROKEN" if outcome.broken else "held"
    print(f"{outcome.name:32} {outcome.tried:4} times  {verdict:10} {outcome.seen}", flush=True)
    print(f"    promised: {outcome.promised}", flush=True)
    for line in outcome.broken[:20]:
        print(f"    {line}", flush=True)


def _table(runs: list[dict[str, Any]]) -> str:
    """All outcomes of a scenario in one row: times, and the numbers of what was seen, are added."""
    rows: dict[tuple[str, str, str], tuple[int, list[int]]] = {}
    for outcome in (each for run in runs for each in run["outcomes"]):
        seen = _COUNT.sub("{}", outcome["seen"])
        numbers = [int(each) for each in _COUNT.findall(outcome["seen"])]
        tried, before = rows.get((outcome["name"], outcome["promised"], seen), (0, [0] * len(numbers)))
        total = [a + b for a, b in zip(before, numbers, strict=True)]
        rows[outcome["name"], outcome["promised"], seen] = tried + outcome["tried"], total
    lines = [
        f"| {name} | {tried} | {promised} | {seen.format(*numbers)} |"
        for (name, promised, seen), (tried, numbers) in rows.items()
    ]
    return "\n".join(["| scenario | times | promised | seen |", "|---|---|---|---|", *lines])


def _run(outcomes: list[Outcome], seed: int) -> dict[str, object]:
    libraries = {"onnxruntime": onnxruntime.__version__, "av": av.__version__, "numpy": np.__version__}
    return {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **libraries},
        "seed": seed,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


if __name__ == "__main__":
    main()
