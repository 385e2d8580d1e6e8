"""The rule of fuzzing: a documented error with its exit code, or a result; never another exception."""

from __future__ import annotations

import random
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from stepcell.errors import StepcellError
from tests.fuzz.inputs import Input

__all__ = ["Outcome", "fuzz"]

SLOW_SECONDS = 60.0  # also on a busy machine, and with the imports of the first case


@dataclass
class Outcome:
    """Cases of one input: how many ended in each class of error or were accepted, and the faults by their place."""

    cases: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)


def fuzz(
    what: Input, *, seed: int, cases: int | None = None, seconds: float = 1e9, keep: Path | None = None
) -> Outcome:
    """Run cases until one of the limits.

    Args:
        seed: of the generator; a fault is repeated by the same seed.
        keep: folder for the files that ended in a fault.
    """
    rng = random.Random(f"{what.name} {seed}")
    seeds = what.seeds()
    outcome, end = Outcome(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"case{what.suffix}"
        while outcome.cases != cases and time.monotonic() < end:
            data = what.mutate(rng.choice(seeds), rng)
            path.write_bytes(data)
            started = time.monotonic()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # numpy's, about numbers that the file has
                    what.use(path)
                outcome.ends["accepted"] += 1
            except StepcellError as error:
                outcome.ends[type(error).__name__] += 1
            except Exception as error:
                outcome.ends["fault"] += 1
                place = f"{type(error).__name__} at {traceback.extract_tb(error.__traceback__)[-1]}"
                if place not in outcome.faults:
                    outcome.faults[place] = traceback.format_exc()
                    if keep is not None:
                        (keep / f"{what.name}-{seed}-{outcome.cases}{what.suffix}").write_bytes(data)
            if time.monotonic() - started > SLOW_SECONDS:
                outcome.faults.setdefault("slow", f"case {outcome.cases} took {time.monotonic() - started:.0f} s")
            outcome.cases += 1
    return outcome
