"""Scenarios, and the table of what was promised and seen."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path


@dataclass
class Outcome:
    """What was promised, and what was seen.

    Attributes:
        name: the scenario.
        promised: what docs/fleet.md says.
        seen: what came out.
        broken: a line for each time the promise did not hold.
    """

    name: str
    promised: str
    seen: str = ""
    broken: list[str] = field(default_factory=list)

    def require(self, holds: bool, otherwise: str) -> None:
        """Note that the promise did not hold."""
        if not holds:
            self.broken.append(otherwise)


def run_scenarios(
    runs: Mapping[str, Callable[[], Outcome]],
    *,
    only: str | None,
    output: Path | None,
    packages: Sequence[str],
    seed: int | None = None,
) -> bool:
    """Run scenarios, print each outcome and write all of them; whether every promise held.

    Args:
        runs: scenarios by name.
        only: those with this in their name.
        output: JSON file.
        packages: whose versions are noted.
        seed: of random moments.
    """
    outcomes: list[Outcome] = []
    for scenario, run in runs.items():
        if only is not None and only not in scenario:
            continue
        started = time.monotonic()
        outcome = run()
        outcomes.append(outcome)
        verdict = f"{len(outcome.broken)} BROKEN" if outcome.broken else "held"
        print(f"{outcome.name}: {verdict} ({time.monotonic() - started:.0f} s)\n    {outcome.seen}", flush=True)
        for line in outcome.broken[:20]:
            print(f"    {line}", flush=True)
        if output:
            output.write_text(json.dumps(_document(outcomes, packages, seed), indent=1) + "\n")
    return not any(outcome.broken for outcome in outcomes)


def _document(outcomes: Sequence[Outcome], packages: Sequence[str], seed: int | None) -> dict[str, object]:
    return {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        **({} if seed is None else {"seed": seed}),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
