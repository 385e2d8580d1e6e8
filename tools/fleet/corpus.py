"""`make fleet`, second part: `stepcell map --engine ray` on three nodes of one machine, with kills.

    python -m tools.fleet.corpus MODEL --output benchmarks/results/fleet_ray.json

Run by the environment of tools/fleet/ray_requirements.txt. Ray's ports are open to all networks of a machine: the whole
runs in a network namespace of its own (`unshare`, from util-linux). The exit code is 1 if a promise did not hold.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.fleet.corpus_scenarios import CorpusScenarios
from tools.fleet.outcome import run_scenarios

PACKAGES = ("ray", "onnxruntime", "av", "numpy")
INSIDE = "STEPCELL_FLEET_INSIDE"  # set in the namespace


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the zoo's denoiser in float32")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--only", help="scenarios with this in their name")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    if INSIDE not in os.environ:
        sys.exit(_inside())
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="fleet") as name:
        scenarios = CorpusScenarios(options.model.absolute(), Path(name), options.clips)
        held = run_scenarios(
            {
                "equal": scenarios.equal,
                "worker_killed": scenarios.worker_killed,
                "raylet_killed": scenarios.raylet_killed,
                "machine_lost": scenarios.machine_lost,
                "killed_twice": scenarios.killed_twice,
                "not_shared": scenarios.not_shared,
                "ended": scenarios.ended,
                "own_cluster": scenarios.own_cluster,
            },
            only=options.only,
            output=options.output,
            packages=PACKAGES,
        )
    sys.exit(not held)


def _inside() -> int:
    """Run this again in namespaces of its own, for the network, mounts and processes: all end with it."""
    unshare = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.getuid():
        unshare += ["--map-root-user"]
    command = [*unshare, sys.executable, "-m", "tools.fleet.corpus", *sys.argv[1:]]
    return subprocess.run(command, env=os.environ | {INSIDE: "1"}, check=False).returncode


if __name__ == "__main__":
    main()
