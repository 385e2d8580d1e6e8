"""`make fleet`: real servers, real clients and everything that is done to them; a table of what was promised and seen.

    python -m tools.fleet MODEL --output benchmarks/results/fleet.json

Run by the environment of tools/fleet/requirements.txt. All servers listen on 127.0.0.1. The exit code is 1 if a promise
did not hold.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tools.fleet.outcome import Outcome, run_scenarios
from tools.fleet.run_on_server import run_on_server
from tools.fleet.scenarios import Scenarios
from tools.fleet.shared_memory import shared_memory
from tools.fleet.throughput import throughput

PACKAGES = ("nvidia-pytriton", "tritonclient", "onnxruntime", "numpy")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the zoo's denoiser in float32")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--starts", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3, help="of the server and the loop, in turn")
    parser.add_argument("--frames", type=int, default=60, help="of 1920x1080 by each way")
    parser.add_argument("--port", type=int, default=18100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="scenarios with this in their name")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stepcell-fleet") as name:
        scenarios = Scenarios(
            options.model,
            Path(name),
            random.Random(options.seed),
            port=options.port,
            kills=options.kills,
            starts=options.starts,
        )
        runs: dict[str, Callable[[], Outcome]] = {
            "equal": lambda: scenarios.equal(1),
            "equal_instances": lambda: scenarios.equal(2),
            "numpy_2": scenarios.numpy_2,
            "idle": scenarios.idle,
            "shared_id": scenarios.shared_id,
            "in_flight": scenarios.in_flight,
            "deadlines": scenarios.deadlines,
            "stopped": scenarios.stopped,
            "balanced": scenarios.balanced,
            "dead_processes": scenarios.dead_processes,
            "run_on_server": lambda: run_on_server(options.model, Path(name), options.port, scenarios.log),
            "shared_memory": lambda: shared_memory(Path(name), options.port, scenarios.log, options.frames),
            "throughput": lambda: throughput(options.model, Path(name), options.port, scenarios.log, options.rounds),
        }
        held = run_scenarios(
            runs,
            only=options.only and options.only.replace("-", "_"),
            output=options.output,
            packages=PACKAGES,
            seed=options.seed,
        )
        if not held:
            for log in Path(name).glob("*.log"):
                print(log.read_text()[-4000:], file=sys.stderr)
    sys.exit(not held)


if __name__ == "__main__":
    main()
